"""Parameters of the model: their sizes, the units they are gathered in, and each process's part of them."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final

import torch

from megatron_rdt.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.mesh import choose_sharded_dimension
from megatron_rdt.parallel.optimizers import is_stepped_by_muon
from megatron_rdt.parallel.tensor_parallel import split_dimension
from megatron_rdt.planner.shape import COMPUTE_BYTES, FLOAT32

# Units; the others are named after their layers.
ROOT: Final = "root"
CORE: Final = "core"
EXPERT_NAMES = ("feedforward.gate", "feedforward.up", "feedforward.down")


@dataclass(frozen=True)
class Parameter:
    """Name and shape of one parameter, and its sizes on a process.

    Attributes:
        name: its name in the model.
        shape: shape of the whole parameter.
    """

    name: str
    shape: tuple[int, ...]

    @cached_property
    def unit(self) -> str:
        """Unit it is gathered with: "prelude.0", "core", "coda.1", or "root" for embedding, final norm and head."""
        first, second, *_ = (*self.name.split("."), "")
        return f"{first}.{second}" if first in ("prelude", "coda") else "core" if first == "core" else ROOT

    @cached_property
    def size(self) -> int:
        """Number of its elements."""
        return prod(self.shape)

    @cached_property
    def is_routed(self) -> bool:
        """True if it holds the weights of routed experts."""
        return self.name.endswith(EXPERT_NAMES)

    @cached_property
    def is_rounded_once(self) -> bool:
        """True for a matrix of the core's layers whose products are in the compute dtype."""
        is_other = self.name.endswith(("token_values.weight", "router"))  # a table; float32 products
        return self.name.startswith("core.layers.") and len(self.shape) > 1 and not is_other

    @cached_property
    def split_dim(self) -> int | None:
        """Dimension that tensor parallelism splits; None if every process holds it whole."""
        return split_dimension(self.name)

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """Return its shape on a process after tensor and expert parallelism have split it, before FSDP shards it."""
        shape = list(self.shape)
        if layout.expert > 1 and self.is_routed:
            shape[0] = -(-shape[0] // layout.expert)
        elif layout.tensor > 1 and self.split_dim is not None:
            shape[self.split_dim] = -(-shape[self.split_dim] // layout.tensor)
        return tuple(shape)

    def local_size(self, layout: Layout) -> int:
        """Return how many of its elements a process computes with once they are gathered."""
        return prod(self.local_shape(layout))

    def padded_shard_size(self, layout: Layout, ranks: int) -> int:
        """Return the elements of a process's shard, padded to the largest, when `ranks` processes share the parameter."""
        if layout.expert > 1 and self.is_routed:  # expert parallelism has dealt them out already
            return self.local_size(layout)
        shape = self.local_shape(layout)
        dealt = shape[choose_sharded_dimension(shape, ranks)]
        return -(-dealt // ranks) * (prod(shape) // dealt)


_known: dict[str, tuple[Parameter, ...]] = {}


def list_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """List every parameter of the model, which is built on the meta device and takes no memory."""
    key = repr(config)
    if key not in _known:
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config)
        _known[key] = tuple(Parameter(name, tuple(p.shape)) for name, p in model.named_parameters())
    return _known[key]


def list_units(config: ModelConfig) -> list[str]:
    """List the units in the order of a forward pass, without the root, which comes first."""
    prelude = [f"prelude.{i}" for i in range(config.prelude_layers)]
    return [*prelude, "core", *(f"coda.{i}" for i in range(config.coda_layers))]


def core_units(config: RunConfig) -> dict[str, tuple[Parameter, ...]]:
    """Group the core's parameters by gather: "" once per pass; matrices in "layers" or "core.layers.0." ... per iteration."""
    core = tuple(p for p in list_parameters(config.model) if p.unit == "core")
    if config.parallel.core_gather == "once":
        return {"": core}
    inner = tuple(p for p in core if p.is_rounded_once)
    units = {"": tuple(p for p in core if not p.is_rounded_once)}
    if config.parallel.core_gather == "per_iteration":
        return units | {"layers": inner}
    names = [f"core.layers.{i}." for i in range(config.model.core_layers)]
    return units | {name: tuple(p for p in inner if p.name.startswith(name)) for name in names}


def piece_width(config: RunConfig) -> int:
    """Return the bytes of a number in a gather of a core in pieces: of the compute dtype, unless products are in float8."""
    return COMPUTE_BYTES[config.train.precision] if config.train.float8 == "none" else FLOAT32


def part_sizes(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of "embedding", "prelude", "core", "coda", "final norm", "output matrix"; omit zeros."""
    parts = dict.fromkeys(("embedding", "prelude", "core", "coda", "final norm", "output matrix"), 0)
    names = {"final_norm": "final norm", "head": "output matrix"}
    for parameter in list_parameters(config):
        first = parameter.name.split(".")[0]
        parts[names.get(first, first)] += parameter.size
    return {name: size for name, size in parts.items() if size}


def active_parameters(config: ModelConfig) -> int:
    """Count the parameters that one token is computed with, each once for any T; of experts, those it is sent to."""
    share = config.experts_per_token / config.experts
    return round(sum(p.size * (share if p.is_routed else 1.0) for p in list_parameters(config)))


def moments_per_weight(parameter: Parameter, config: OptimizerConfig) -> int:
    """Return how many numbers of state the optimizer keeps for each element: 1 for Muon, 2 for AdamW."""
    return 1 if is_stepped_by_muon(parameter.name, torch.empty(parameter.shape, device="meta"), config) else 2
