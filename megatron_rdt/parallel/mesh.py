"""The processes of a sharded run as meshes: who shards with whom, on which axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_rdt.config.layout import Layout

# Of the rows of a shard, as many times as there are; more padding than that and another dimension is looked for.
MOST_PADDING = 1.125


def sharded_dimension(shape: Sequence[int], ranks: int) -> int:
    """The dimension along which FSDP2 deals a parameter of this shape out to `ranks` processes.

    Rows, padded to a multiple of the ranks, as FSDP2 does by itself. Experts, (experts, out, in), may be far fewer than
    ranks, and a gather would be padding for the most part: then another dimension that divides is taken.
    """
    rows = shape[0]
    if -(-rows // ranks) * ranks <= MOST_PADDING * rows:
        return 0
    return next((dim for dim, size in enumerate(shape) if dim and size % ranks == 0), 0)


@dataclass(frozen=True)
class Meshes:
    """The meshes that a layout needs; None for an axis of one process.

    Attributes:
        state: over which FSDP2 shards parameters, gradients and optimizer state: 1-D, or 2-D with replicas first.
        tensor: the processes that share out heads, channels and vocabulary.
        context: the processes that share out the tokens of each sequence.
        expert: the processes that share out the experts.
        expert_replicas: those that hold the same experts.
    """

    state: DeviceMesh
    tensor: DeviceMesh | None = None
    context: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    expert_replicas: DeviceMesh | None = None


def make_meshes(layout: Layout, device: torch.device, timeout_s: float) -> Meshes:
    """Meshes of all processes; every process calls this.

    Args:
        layout: sizes of the axes.
        device: where the processes compute.
        timeout_s: seconds after which a collective on any of the meshes fails.
    """
    kind = device.type
    sharing = layout.shard * layout.context
    whole = init_device_mesh(
        kind, (layout.replicate, sharing, layout.tensor), mesh_dim_names=("replicate", "shard", "tensor")
    )
    state = whole["replicate", "shard"] if layout.replicate > 1 else whole["shard"]
    tensor = whole["tensor"] if layout.tensor > 1 else None
    context = expert = replicas = None
    if layout.context > 1:
        shape = (layout.data, layout.context, layout.tensor)
        context = init_device_mesh(kind, shape, mesh_dim_names=("data", "context", "tensor"))["context"]
    if layout.expert > 1:
        holders = layout.world_size // layout.expert
        mesh = init_device_mesh(kind, (holders, layout.expert), mesh_dim_names=("expert_replicas", "expert"))
        expert = mesh["expert"]
        replicas = mesh["expert_replicas"] if holders > 1 else None
    # A mesh gives its groups torch's own timeout, on CPUs half an hour.
    for made in (state, tensor, context, expert, replicas):
        for group in made.get_all_groups() if made is not None else []:
            _set_pg_timeout(timedelta(seconds=timeout_s), group)
    return Meshes(state, tensor, context, expert, replicas)
