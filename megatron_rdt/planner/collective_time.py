"""Time of collectives, from their bytes, the links of a device and the hops of NCCL's algorithms; nothing is timed."""

from math import ceil, log2

from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device
from megatron_rdt.planner.communication import EXCHANGE, REDUCE, SEND, Collectives

# Seconds that NCCL's model of its own algorithms assumes (protocol LL128, src/graph/tuning.cc): of a call, and of a hop to
# the next process of the node or to the next node, in a ring and in a tree.
START = 10e-6
RING_INSIDE, RING_BETWEEN = 1.9e-6, 4.0e-6
TREE_INSIDE, TREE_BETWEEN = 1.2e-6, 8.5e-6


def group_size(axis: str, layout: Layout, device: Device) -> tuple[int, int]:
    """Return the number of processes in a group along `axis`, and the number of them that share a node."""
    inner = layout.context * layout.tensor
    size, stride = {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "state": (layout.shard * layout.context, layout.tensor),
        "replicate": (layout.replicate, layout.shard * inner),
        "expert": (layout.expert, 1),
        "holders": (layout.world_size // layout.expert, layout.expert),
        "world": (layout.world_size, 1),
        "ring": (layout.ring, layout.stage_ranks * inner),
        "stage": (layout.stage_ranks * layout.context, layout.tensor),
    }[axis]
    return size, max(min(size, device.per_node // stride), 1)


def call_latency(kind: str, size: int, together: int) -> float:
    """Return the time of a call without bytes: gathers and scatters pass through a ring, an all-reduce through the faster
    of a ring, twice, and a tree, up and down; exchanges and messages go straight to their receivers.

    Args:
        kind: of the collective.
        size: processes that take part.
        together: those of them that share a node.
    """
    nodes = ceil(size / together)
    ring = (size - nodes) * RING_INSIDE + (nodes - 1) * RING_BETWEEN
    if kind in (EXCHANGE, SEND):
        return START + (RING_BETWEEN if nodes > 1 else RING_INSIDE)
    if kind == REDUCE:
        tree = (together - 1) * TREE_INSIDE + log2(nodes) * TREE_BETWEEN
        return START + 2 * min(ring, tree)
    return START + ring


def collective_seconds(sent: Collectives, layout: Layout, device: Device, expert_load: float = 1.0) -> float:
    """Return the time of collectives: their latencies, and their bytes over the links at full bandwidth.

    A gather or scatter over n processes moves all of the buffer but 1/n once over every link on its way, so the network
    ports of the processes that share a node carry it together. An all-reduce is one of each. In an exchange every process
    has a buffer of its own: 1/n for each of the others, over its own port if that one is on another node; all wait for the
    process whose experts have `expert_load` times the mean load.
    """
    size, together = group_size(sent.axis, layout, device)
    if size == 1:
        return 0.0
    nodes = ceil(size / together)
    if sent.kind == EXCHANGE:
        inside = expert_load * sent.size * (together - 1) / size / device.intra_bandwidth
        between = expert_load * sent.size * (size - together) / size / device.inter_bandwidth
    elif sent.kind == SEND:
        inside, between = sent.size / device.intra_bandwidth, sent.size / device.inter_bandwidth if nodes > 1 else 0.0
    else:
        inside = sent.size * (1 - 1 / size) / device.intra_bandwidth if together > 1 else 0.0
        between = sent.size * (1 - 1 / nodes) / (together * device.inter_bandwidth)
    moved = max(inside, between) * (2 if sent.kind == REDUCE else 1)
    return sent.calls * call_latency(sent.kind, size, together) + moved
