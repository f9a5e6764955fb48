"""`rdt prep verify`: every byte of a corpus compared with its manifest."""

import time
from dataclasses import dataclass

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError, DataError
from megatron_rdt.files import PathText


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `rdt prep verify`."""

    directory: PathText
    """Corpus that `rdt prep` wrote."""
    workers: int = 0
    """Reading threads; 0 takes one per core."""


def verify(words: list[str]) -> int:
    """Read every byte of a corpus, compare it with the manifest, and name everything that differs.

    Raises:
        DataError: something differs; each finding has been printed.
    """
    options = parse_options("prep verify", summary_of(verify), VerifyOptions, words)
    if options.workers < 0:
        raise ConfigError(f"--workers is {options.workers}, it must be at least 0.")
    from megatron_rdt.data.shard_files.corpus_manifest import load_manifest
    from megatron_rdt.data.shard_files.verify import count_shard_bytes, verify_corpus
    from megatron_rdt.terminal import show_progress

    manifest, begun = load_manifest(options.directory), time.monotonic()
    size = count_shard_bytes(manifest)
    with show_progress(size, "verify", "B", scaled=True) as advance:
        findings = verify_corpus(options.directory, options.workers, advance)
    for finding in findings:
        print(finding if finding.serious else f"{finding} (harmless)")
    damaged = sorted({finding.file for finding in findings if finding.serious})
    if damaged:
        raise DataError(
            f"{options.directory} is not as it was written: {', '.join(damaged[:4])}"
            f"{f' and {len(damaged) - 4} more files' if len(damaged) > 4 else ''}. Put whole files back from a copy of this "
            "corpus, or prepare all of it again with `rdt prep` and --restart true; single shards are not rebuilt."
        )
    shards = list(manifest.shard_records())
    tokens = sum(record["tokens"] for _, record in shards)
    print(
        f"{options.directory} is as it was written: {len(shards)} shards, {tokens:,} tokens, {size / 1e6:,.1f} MB, "
        f"read in {time.monotonic() - begun:.1f} s"
    )
    return EXIT_OK
