"""`rdt prep show`: windows or whole documents of a corpus, as text."""

import sys
from dataclasses import dataclass, field
from typing import Literal

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText


@dataclass(frozen=True)
class ShowOptions:
    """Options of `rdt prep show`."""

    directory: PathText
    """Corpus that `rdt prep` wrote."""
    split: Literal["train", "valid"] = "train"
    """Split to show."""
    samples: int = 3
    """Number of windows to show, in the order of a run."""
    first: int = 0
    """Sample of the run whose window is the first to show."""
    sequence_length: int = 256
    """Tokens of a window: `train.sequence_length` of the run."""
    seed: int = 0
    """`run.seed` of the run."""
    documents: list[int] = field(default_factory=list)
    """Show these whole documents instead, by their numbers in the split, from 0."""
    ids: bool = False
    """Also print the token ids."""


def show(words: list[str]) -> int:
    """Print windows of a corpus in the order of a run, or whole documents, as text."""
    options = parse_options("prep show", summary_of(show), ShowOptions, words)
    if options.samples < 1 or options.first < 0 or options.sequence_length < 1:
        raise ConfigError("--samples and --sequence_length must be at least 1, and --first at least 0.")
    from data_prep import show_corpus
    from megatron_rdt.data.shard_files.corpus_manifest import load_manifest

    style = show_corpus.Style(sys.stdout.isatty(), options.ids)
    for line in show_corpus.describe_corpus(load_manifest(options.directory)):
        print(style.format_heading(line))
    if options.documents:
        lines = show_corpus.format_documents(options.directory, options.split, options.documents, style)
    else:
        numbers = range(options.first, options.first + options.samples)
        lines = show_corpus.format_windows(
            options.directory, options.split, numbers, options.sequence_length, options.seed, style
        )
    for line in lines:
        print(line)
    return EXIT_OK
