"""How many parameters there are, where they belong, and what each process holds of them."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from megatron_rdt.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.mesh import choose_sharded_dimension
from megatron_rdt.parallel.optimizers import is_stepped_by_muon
from megatron_rdt.parallel.tensor_parallel import split_dimension

FLOAT32 = 4
ROOT = "root"
EXPERT_NAMES = ("feedforward.gate", "feedforward.up", "feedforward.down")


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: as in the model.
        shape: of the whole.
    """

    name: str
    shape: tuple[int, ...]

    @cached_property
    def unit(self) -> str:
        """What is gathered together: "prelude.0", "core", "coda.1", or "root" for embedding, final norm and head."""
        first, second, *_ = (*self.name.split("."), "")
        return f"{first}.{second}" if first in ("prelude", "coda") else "core" if first == "core" else ROOT

    @cached_property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @cached_property
    def routed(self) -> bool:
        """Whether it holds routed experts."""
        return self.name.endswith(EXPERT_NAMES)

    @cached_property
    def split(self) -> int | None:
        """The dimension that tensor parallelism splits."""
        return split_dimension(self.name)

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """What tensor and expert parallelism leave to a process, before the state is sharded."""
        shape = list(self.shape)
        if layout.expert > 1 and self.routed:
            shape[0] = -(-shape[0] // layout.expert)
        elif layout.tensor > 1 and self.split is not None:
            shape[self.split] = -(-shape[self.split] // layout.tensor)
        return tuple(shape)

    def local(self, layout: Layout) -> int:
        """Numbers that a process computes with, once gathered."""
        return prod(self.local_shape(layout))

    def padded_shard(self, layout: Layout, ranks: int) -> int:
        """Numbers of a process's shard when the state is dealt out over `ranks`, the last ones padded."""
        if layout.expert > 1 and self.routed:  # not sharded any further
            return self.local(layout)
        shape = self.local_shape(layout)
        dealt = shape[choose_sharded_dimension(shape, ranks)]
        return -(-dealt // ranks) * (prod(shape) // dealt)


_known: dict[str, tuple[Parameter, ...]] = {}


def parameters_of(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model, which is built on the meta device and takes no memory."""
    key = repr(config)
    if key not in _known:
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config)
        _known[key] = tuple(Parameter(name, tuple(p.shape)) for name, p in model.named_parameters())
    return _known[key]


def units_of(config: ModelConfig) -> list[str]:
    """The units in the order of a forward pass, the root, which comes first, left out."""
    prelude = [f"prelude.{i}" for i in range(config.prelude_layers)]
    return [*prelude, "core", *(f"coda.{i}" for i in range(config.coda_layers))]


def core_units(config: RunConfig) -> dict[str, tuple[Parameter, ...]]:
    """The core's parameters by the units that `parallel.core_gather` makes; "" is what is gathered once."""
    core = tuple(p for p in parameters_of(config.model) if p.unit == "core")
    if config.parallel.core_gather == "once":
        return {"": core}
    inner = tuple(p for p in core if p.name.startswith("core.layers."))
    units = {"": tuple(p for p in core if p not in inner)}
    if config.parallel.core_gather == "per_iteration":
        return units | {"layers": inner}
    names = [f"core.layers.{i}." for i in range(config.model.core_layers)]
    return units | {name: tuple(p for p in inner if p.name.startswith(name)) for name in names}


def part_sizes(config: ModelConfig) -> dict[str, int]:
    """Parameters of the model's parts, by name; they add up to all."""
    parts = dict.fromkeys(("embedding", "prelude", "core", "coda", "final norm", "output matrix"), 0)
    names = {"final_norm": "final norm", "head": "output matrix"}
    for parameter in parameters_of(config):
        first = parameter.name.split(".")[0]
        parts[names.get(first, first)] += parameter.size
    return {name: size for name, size in parts.items() if size}


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token is computed with, each counted once whatever T is: of experts, those it is sent to."""
    share = config.experts_per_token / config.experts
    return round(sum(p.size * (share if p.routed else 1.0) for p in parameters_of(config)))


def moments(parameter: Parameter, config: OptimizerConfig) -> int:
    """Numbers of optimizer state per number of the parameter."""
    return 1 if is_stepped_by_muon(parameter.name, torch.empty(parameter.shape, device="meta"), config) else 2
