"""`rdt prep import`: a corpus from .bin and .idx files in Megatron's format."""

import json
from dataclasses import dataclass, field

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText


@dataclass(frozen=True)
class ImportOptions:
    """Options of `rdt prep import`."""

    prefixes: list[PathText]
    """Paths of .bin and .idx files without the extension; each becomes one shard."""
    tokenizer: PathText = ""
    """Tokenizer that made them: a model file, or a folder such as `rdt prep` writes."""
    out: PathText = ""
    """Directory of the corpus to write."""
    valid_prefix: list[PathText] = field(default_factory=list)
    """Prefixes of the validation split's files."""


def import_files(words: list[str]) -> int:
    """Make a corpus of .bin and .idx files in Megatron's format: check them, link them, write a manifest."""
    # The prefixes are one positional list: all words before the first option.
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    prefixes = [json.dumps(words[:count])] if count else []
    options = parse_options("prep import", summary_of(import_files), ImportOptions, [*prefixes, *words[count:]])
    if not options.tokenizer or not options.out:
        raise ConfigError(
            "--tokenizer and --out must be given: the tokenizer that made the files, and a new directory."
        )
    from data_prep.import_megatron import import_corpus

    print(f"imported: {import_corpus(options.prefixes, options.tokenizer, options.out, options.valid_prefix)}")
    return EXIT_OK
