"""`rdt convert`: a checkpoint for transformers, or for the engines of another family."""

from dataclasses import dataclass, field
from typing import Literal

from launch.command_options import parse_options, summary_of
from megatron_rdt.config.engines import describe_checkpoint_formats
from megatron_rdt.config.option_types import HELP
from megatron_rdt.errors import EXIT_OK
from megatron_rdt.files import PathText


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `rdt convert`."""

    checkpoint: PathText
    """Checkpoint, or run directory (its newest healthy checkpoint)."""
    out: PathText
    """Directory to write; must not exist, or be empty."""
    to: Literal["hf", "native", "zero"] = field(
        default="hf", metadata={HELP: f"hf: a folder for transformers; {describe_checkpoint_formats()}."}
    )
    """Format to write."""


def convert(words: list[str]) -> int:
    """Convert a checkpoint for transformers or for another engine."""
    options = parse_options("convert", summary_of(convert), ConvertOptions, words)
    from megatron_rdt.convert import convert as convert_checkpoint

    print(f"written: {convert_checkpoint(options.checkpoint, options.out, options.to)}")
    return EXIT_OK
