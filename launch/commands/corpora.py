"""Commands for corpora that are there: `rdt prep verify`, `rdt prep show`, and `rdt prep import`, which makes one."""

import io
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Literal, TypeVar

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


@dataclass(frozen=True)
class ShowOptions:
    """Options of `rdt prep show`."""

    directory: str
    """Corpus that `rdt prep` wrote."""
    split: Literal["train", "valid"] = "train"
    """Split to show."""
    samples: int = 3
    """Windows to show, as a run takes them."""
    first: int = 0
    """Number of the first of them in the run."""
    sequence_length: int = 256
    """Tokens of a window: `train.sequence_length` of the run."""
    seed: int = 0
    """`run.seed` of the run."""
    documents: list[int] = field(default_factory=list)
    """Show whole documents instead, by their numbers in the split, from 0."""
    ids: bool = False
    """Also print the ids of the tokens."""


@dataclass(frozen=True)
class ImportOptions:
    """Options of `rdt prep import`."""

    prefixes: list[str]
    """Paths of .bin and .idx files without these endings; each becomes one shard."""
    tokenizer: str = ""
    """Tokenizer that made them: a folder, as `rdt prep` writes one, or a model file."""
    out: str = ""
    """Corpus to write."""
    valid_prefix: list[str] = field(default_factory=list)
    """Prefixes of the validation split's files."""


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

    from megatron_rdt.data.shard_files.corpus_manifest import load_manifest
    from megatron_rdt.data.shard_files.verify import corpus_bytes, verify_corpus

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


def show(words: list[str]) -> int:
    """Print windows of a corpus as a run takes them, or whole documents, as text."""
    options = _options("show", show.__doc__ or "", ShowOptions, words)
    if options.samples < 1 or options.first < 0 or options.sequence_length < 1:
        raise ConfigError("--samples and --sequence_length must be at least 1, and --first at least 0.")
    from data_prep import show as text
    from megatron_rdt.data.shard_files.corpus_manifest import load_manifest

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have every character
    style = text.Style(sys.stdout.isatty(), options.ids)
    for line in text.describe(load_manifest(options.directory)):
        print(style.heading(line))
    if options.documents:
        lines = text.documents(options.directory, options.split, options.documents, style)
    else:
        numbers = range(options.first, options.first + options.samples)
        lines = text.windows(options.directory, options.split, numbers, options.sequence_length, options.seed, style)
    for line in lines:
        print(line)
    return EXIT_OK


def import_files(words: list[str]) -> int:
    """Make a corpus of .bin and .idx files in Megatron's format: check them, link them, write a manifest."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    given = [json.dumps(words[:count])] if count else []
    options = _options("import", import_files.__doc__ or "", ImportOptions, [*given, *words[count:]])
    if not options.tokenizer or not options.out:
        raise ConfigError(
            "--tokenizer and --out must be given: the tokenizer that made the files, and a new directory."
        )
    from data_prep.importing import import_corpus

    print(f"imported: {import_corpus(options.prefixes, options.tokenizer, options.out, options.valid_prefix)}")
    return EXIT_OK
