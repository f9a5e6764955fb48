"""Judgement of a job's nodes: which of them are unfit for a run, and why."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.node_checks import NodeFacts


@dataclass(frozen=True)
class Limits:
    """Bounds within which a node is fit.

    Attributes:
        devices: GPUs of each node; -1: as many as most have.
        free_share: of a GPU's memory that has to be free.
        free_gib: of the disk of the run's folder.
        clock_s: largest difference from the clock of most.
        bandwidth: smallest gigabytes per second of an all-reduce.
    """

    devices: int
    free_share: float
    free_gib: float
    clock_s: float
    bandwidth: float


def judge_nodes(nodes: Sequence[NodeFacts], missing: Sequence[str], limits: Limits) -> dict[str, list[str]]:
    """Return the reasons against each unfit node, by its name; empty if all are fit.

    Args:
        nodes: facts of those that answered.
        missing: names of the others.
        limits: the bounds.
    """
    reasons: dict[str, list[str]] = {name: ["did not answer in time"] for name in missing}

    def add(node: NodeFacts, reason: str) -> None:
        reasons.setdefault(node.host, []).append(reason)

    kinds = Counter(tuple(node.devices) for node in nodes)
    usual = kinds.most_common(1)[0][0] if kinds else ()
    count = limits.devices if limits.devices >= 0 else len(usual)
    # Clocks are compared with the middle one: rank 0's may be the wrong one.
    middle = statistics.median([node.clock_s for node in nodes]) if nodes else 0.0
    for node in nodes:
        for problem in node.problems:
            add(node, problem)
        if len(node.devices) != count:
            add(node, f"has {len(node.devices)} GPUs, not {count}")
        elif node.devices and kinds[tuple(node.devices)] < kinds[usual]:
            add(
                node,
                f"has {' and '.join(sorted(set(node.devices)))}, the others have {' and '.join(sorted(set(usual)))}",
            )
        if node.free_share < limits.free_share:
            add(node, f"has a GPU with {node.free_share:.0%} of its memory free: another process holds it")
        if node.free_gib < limits.free_gib:
            add(node, f"has {node.free_gib:.1f} GiB free on the run's disk, less than {limits.free_gib:,.1f} GiB")
        if abs(node.clock_s - middle) > limits.clock_s:
            add(node, f"has a clock that is {node.clock_s - middle:+.1f} s from the others'")
    _judge_files(nodes, add)
    _judge_network(nodes, limits.bandwidth, add)
    return reasons


def _judge_files(nodes: Sequence[NodeFacts], add: Callable[[NodeFacts, str], None]) -> None:
    """Find the nodes that do not see the files of others, or whose files the others do not see."""
    pairs = {(node.rank, other) for node in nodes for other in node.unseen}
    # Both ends of a pair may be the cause: blame the one that has most of them first, until none is left.
    by_rank = {node.rank: node for node in nodes}
    while pairs:
        counts = Counter(rank for pair in pairs for rank in set(pair))
        # In a tie between two nodes it is the one that is not rank 0, whose folder the run is.
        worst = max(counts, key=lambda rank: (counts[rank], rank))
        others = sorted({rank for pair in pairs if worst in pair for rank in pair} - {worst})
        names = ", ".join(by_rank[rank].host if rank in by_rank else f"rank {rank}" for rank in others)
        if worst in by_rank:
            add(by_rank[worst], f"does not share the run's folder with {names or 'itself'}")
        pairs = {pair for pair in pairs if worst not in pair}


def _judge_network(nodes: Sequence[NodeFacts], limit: float, add: Callable[[NodeFacts, str], None]) -> None:
    """Find the nodes with which every pair is too slow; where all are, each is named with its bandwidth."""
    slow = {node.rank: dict(node.bandwidths) for node in nodes if node.bandwidths.get("all", limit) < limit}
    for node in nodes:
        measured = slow.get(node.rank)
        if measured is None:
            continue
        pairs = {other: value for other, value in measured.items() if other != "all"}
        if all(value < limit for value in pairs.values()):
            best = max(pairs.values(), default=measured["all"])
            add(node, f"sends {best:.3g} GB/s, less than {limit:g}")
