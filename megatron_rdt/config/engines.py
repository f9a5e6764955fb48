"""The table of engines: everything that the rest of the project has to know about an engine by its name.

To add an engine, give it a name in `EngineName`, a row in `ENGINES`, and a class in `megatron_rdt/parallel`.
No other module compares names of engines; each asks the table for the property that it needs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
CheckpointFormat = Literal["native", "zero"]

# Fields of `parallel` that arrange processes along the axes of sharding.
AXES = ("replicate", "context", "tensor", "expert")


@dataclass(frozen=True)
class EngineKind:
    """The properties of one engine.

    Attributes:
        summary: what it does with the model's state, for help.
        many_processes: runs on any number of processes, which join a process group; otherwise on one, without a group.
        checkpoint_format: native: torch.distributed.checkpoint; zero: DeepSpeed's files. Engines of one format resume
            from each other's checkpoints.
        shards_parameters: each process holds a shard of every parameter and gathers the whole when it is needed.
        zero_stage: DeepSpeed's ZeRO stage; 0 for an engine without DeepSpeed.
        options: fields of `parallel` that the engine takes, besides those that every engine takes.
        optimizers: choices of `optimizer.name` that it can step.
        compiles_layers: takes `train.compile layers`.
        averages_weights: takes `optimizer.ema`.
        rounds_state: takes `optimizer.state_dtype bfloat16`.
    """

    summary: str
    many_processes: bool = True
    checkpoint_format: CheckpointFormat = "native"
    shards_parameters: bool = False
    zero_stage: int = 0
    options: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ("adamw", "muon")
    compiles_layers: bool = True
    averages_weights: bool = True
    rounds_state: bool = True

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of sharding that it can arrange processes along."""
        return tuple(name for name in AXES if name in self.options)


def _zero(stage: int) -> EngineKind:
    """Return the row of `ENGINES` for DeepSpeed with this ZeRO stage."""
    return EngineKind(
        f"DeepSpeed ZeRO stage {stage}",
        checkpoint_format="zero",
        shards_parameters=stage == 3,
        zero_stage=stage,
        options=("offload", "deepspeed"),
        optimizers=("adamw",),  # Muon needs whole matrices, DeepSpeed flattens them
        compiles_layers=False,  # DeepSpeed exchanges weights inside a layer
        rounds_state=False,  # DeepSpeed keeps the moments in the dtype of the weights
        averages_weights=False,  # their shards are DeepSpeed's, flattened
    )


ENGINES: dict[EngineName, EngineKind] = {
    "single": EngineKind("one process", many_processes=False),
    "ddp": EngineKind("replicated", options=("reduce",)),
    "fsdp": EngineKind(
        "sharded with FSDP2",
        shards_parameters=True,
        options=(*AXES, "core_gather", "core_ring", "reduce", "reshard_after_forward"),
    ),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
}

ONE_PROCESS: EngineName = "single"
# The engine that takes every axis: messages and run plans propose it for several processes.
PROPOSED: EngineName = "fsdp"


def engines_with(has_property: Callable[[EngineKind], object]) -> list[str]:
    """Return the names of the engines for which `has_property` is true, in the table's order."""
    return [name for name, kind in ENGINES.items() if has_property(kind)]


def join_names(names: Iterable[str], word: str) -> str:
    """Join names for a sentence: "zero1, zero2 or zero3" where `word` is "or"."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def describe_engines() -> str:
    """Return what each engine does, for the help of an option: "single: one process; ddp: replicated; ..."."""
    return "; ".join(f"{name}: {kind.summary}" for name, kind in ENGINES.items())


def describe_checkpoint_formats() -> str:
    """Return which engines read which format, for the help of an option: "native: for single, ddp and fsdp; ..."."""
    formats = dict.fromkeys(kind.checkpoint_format for kind in ENGINES.values())
    readers = {each: engines_with(lambda kind, each=each: kind.checkpoint_format == each) for each in formats}  # type: ignore[misc]
    return "; ".join(f"{each}: for the engines {join_names(names, 'and')}" for each, names in readers.items())
