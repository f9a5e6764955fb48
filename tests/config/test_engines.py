"""The table of engines: each name has its properties and its class."""

from typing import get_args

from launch.commands.convert import ConvertOptions
from megatron_rdt.config import ENGINES, ParallelConfig
from megatron_rdt.config.engines import PROPOSED, EngineName, engines_with, join_names
from megatron_rdt.config.parser import field_help
from megatron_rdt.parallel import CLASSES


def test_every_name_has_a_row_and_a_class() -> None:
    assert get_args(EngineName) == tuple(ENGINES) == tuple(CLASSES)


def test_engines_are_found_by_their_properties() -> None:
    assert engines_with(lambda kind: kind.checkpoint_format == "native") == ["single", "ddp", "fsdp"]
    assert engines_with(lambda kind: kind.zero_stage) == ["zero1", "zero2", "zero3"]
    assert engines_with(lambda kind: kind.shards_parameters) == ["fsdp", "zero3"]
    assert engines_with(lambda kind: kind.axes) == [PROPOSED]


def test_help_names_the_engines_of_the_table() -> None:
    assert field_help(ParallelConfig)["engine"].startswith("single: one process; ddp: replicated; fsdp: sharded")
    assert (
        "native: for the engines single, ddp and fsdp; zero: for the engines zero1," in field_help(ConvertOptions)["to"]
    )
    for name, text in field_help(ParallelConfig).items():
        takers = engines_with(lambda kind, name=name: name in kind.options)  # type: ignore[misc]
        if takers:
            assert text.startswith(f"{', '.join(takers)}: "), f"the help of parallel.{name} names other engines"


def test_names_are_joined_as_in_a_sentence() -> None:
    assert join_names(["zero1", "zero2", "zero3"], "or") == "zero1, zero2 or zero3"
    assert (join_names(["ddp", "fsdp"], "and"), join_names(["zero3"], "or")) == ("ddp and fsdp", "zero3")
