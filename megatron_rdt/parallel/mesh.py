"""Device meshes of a sharded run: the ranks that shard the state, tensors, tokens or experts with each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_rdt.config.layout import Layout
from megatron_rdt.parallel.process_group import limit_collectives

# Largest ratio of padded rows to rows; above it, FSDP2 shards another dimension.
MOST_PADDING = 1.125


def choose_sharded_dimension(shape: Sequence[int], ranks: int) -> int:
    """Return the dimension that FSDP2 shards over `ranks` ranks: 0, unless it needs much padding and another none.

    By default rows, which FSDP2 pads to a multiple of the ranks. Of a tensor of experts, (experts, out, in), there may be
    far fewer rows than ranks, and most of a gather would be padding: then the next dimension that the ranks divide.
    """
    rows = shape[0]
    if -(-rows // ranks) * ranks <= MOST_PADDING * rows:
        return 0
    return next((dim for dim, size in enumerate(shape) if dim and size % ranks == 0), 0)


@dataclass(frozen=True)
class Meshes:
    """The meshes of a layout; None for an axis of one rank.

    Attributes:
        state: the ranks over which FSDP2 shards parameters, gradients and optimizer state: 1-D, or 2-D with replicas
            first.
        tensor: the ranks that split heads, channels and vocabulary among them.
        context: the ranks that split the tokens of each sequence among them.
        expert: the ranks that split the experts among them.
        expert_replicas: the ranks that hold the same experts.
    """

    state: DeviceMesh
    tensor: DeviceMesh | None = None
    context: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    expert_replicas: DeviceMesh | None = None


def make_meshes(layout: Layout, device: torch.device, timeout_s: float) -> Meshes:
    """Create the meshes of a layout; every rank must call this.

    Args:
        layout: sizes of the axes.
        device: any device of the type that the ranks compute on.
        timeout_s: seconds after which a collective on any of the meshes fails.
    """
    kind = device.type
    # Ranks that split the tokens of the same sequences shard the state as well, so both axes are one here.
    state_ranks = layout.shard * layout.context
    # An axis of one rank would cost a group for every rank, which takes seconds on thousands.
    axes = {"replicate": layout.replicate, "shard": state_ranks, "tensor": layout.tensor}
    axes = {name: size for name, size in axes.items() if size > 1 or name == "shard"}
    whole = init_device_mesh(kind, tuple(axes.values()), mesh_dim_names=tuple(axes))
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
    # The groups of a mesh have torch's default timeout, half an hour on CPUs, and no argument sets another.
    limit_collectives(timeout_s)
    return Meshes(state, tensor, context, expert, replicas)
