"""`rdt prep verify`: whether a prepared corpus is as it was written."""

import time
from dataclasses import dataclass
from typing import TypeVar

from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.errors import EXIT_OK, ConfigError, DataError

T = TypeVar("T")


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `rdt prep verify`."""

    directory: str
    """Corpus that `rdt prep` wrote."""
    workers: int = 0
    """Threads that read; 0 takes one per core."""


def _options(name: str, description: str, schema: type[T], words: list[str]) -> T:
    parser = make_parser(schema, f"rdt prep {name}", description, config_file=False, positional=True)
    return parse(parser, schema, words)[0]


def verify(words: list[str]) -> int:
    """Read every byte of a corpus, compare it with the manifest, and name all that differs.

    Raises:
        DataError: something does; what and where has been printed.
    """
    options = _options("verify", (verify.__doc__ or "").splitlines()[0], VerifyOptions, words)
    if options.workers < 0:
        raise ConfigError(f"--workers is {options.workers}, it must be at least 0.")
    from tqdm import tqdm

    from megatron_rdt.data.manifest import load_manifest
    from megatron_rdt.data.verify import corpus_bytes, verify_corpus

    manifest, begun = load_manifest(options.directory), time.monotonic()
    size = corpus_bytes(manifest)
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        findings = verify_corpus(options.directory, options.workers, bar.update)
    for finding in findings:
        print(finding if finding.serious else f"{finding} (harmless)")
    damaged = sorted({finding.place for finding in findings if finding.serious})
    if damaged:
        raise DataError(
            f"{options.directory} is not as it was written: {', '.join(damaged[:4])}"
            f"{f' and {len(damaged) - 4} more files' if len(damaged) > 4 else ''}. Put whole files back from a copy of this "
            "corpus, or prepare all of it again with `rdt prep` and --restart true; single shards are not rebuilt."
        )
    shards = list(manifest.records())
    tokens = sum(record["tokens"] for _, record in shards)
    print(
        f"{options.directory} is as it was written: {len(shards)} shards, {tokens:,} tokens, {size / 1e6:,.1f} MB, "
        f"read in {time.monotonic() - begun:.1f} s"
    )
    return EXIT_OK
