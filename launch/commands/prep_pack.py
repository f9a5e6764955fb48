"""`rdt prep pack`: the packing plans of a corpus, which a run would otherwise make when it starts."""

from dataclasses import dataclass

from launch.command_options import parse_options
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText

DESCRIPTION = "Make the packing plans of a corpus for one sequence length: those that are missing, damaged or made for other shards."


@dataclass(frozen=True)
class PackOptions:
    """Options of `rdt prep pack`."""

    corpus: PathText
    """Directory that `rdt prep` wrote (it holds manifest.json)."""
    sequence_length: int = 256
    """Tokens per sequence, `train.sequence_length` of the run."""


def pack(words: list[str]) -> int:
    """Make the packing plans of a corpus for one sequence length."""
    options = parse_options("prep pack", DESCRIPTION, PackOptions, words)
    if options.sequence_length < 1:
        raise ConfigError(f"--sequence_length is {options.sequence_length}, it must be at least 1.")
    from megatron_rdt.data.packing_plan import make_plans
    from megatron_rdt.data.shard_files.corpus_manifest import load_manifest

    manifest = load_manifest(options.corpus)
    manifest.verify()
    print(
        make_plans(manifest, "train", options.sequence_length, replace_damaged=True).describe(options.sequence_length)
    )
    return EXIT_OK
