"""`rdt preflight`: check every node of a job before the run, and name those that are unfit."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.command_options import parse_options, summary_of
from launch.node_checks import Meeting, NodeFacts, look_at_node
from launch.node_verdict import Limits, judge_nodes
from megatron_rdt.environment import export_for_torch, leave_process, read_process_info
from megatron_rdt.errors import EXIT_FAILED, EXIT_OK, ConfigError
from megatron_rdt.files import PathText, write_text
from megatron_rdt.terminal import align_columns

LEAST_BANDWIDTH = {False: 0.02, True: 1.0}  # GB/s, without and with GPUs


@dataclass(frozen=True)
class PreflightOptions:
    """Options of `rdt preflight`."""

    folder: PathText = "runs"
    """The run's folder, which every node has to see; made if it is missing, as the run would."""
    nodes: str = ""
    """Names of the nodes in the order of their ranks, separated by commas, to name one that does not answer."""
    devices: int = -1
    """GPUs of each node; -1: as many as most have."""
    free_memory: float = 0.9
    """Share of a GPU's memory that has to be free."""
    free_disk: float = 1.0
    """GiB that have to be free on the disk of the folder."""
    clock_difference: float = 5.0
    """Seconds by which the clock of a node may differ from that of most."""
    bandwidth: float = -1.0
    """Least GB/s of an all-reduce between nodes; -1: 1 with GPUs, 0.02 without."""
    timeout: float = 120.0
    """Seconds for a node to answer, and for a collective."""
    unfit: PathText = ""
    """File for the names of unfit nodes, separated by commas, unless all are unfit; empty for none."""


def format_nodes(nodes: Sequence[NodeFacts]) -> list[str]:
    """Return the lines of a table of what the nodes have."""
    rows = [["node", "GPUs", "memory free", "disk free", "clock", "all-reduce"]]
    for node in nodes:
        gpus = f"{len(node.devices)} x {node.devices[0]}" if node.devices else "none"
        bandwidth = f"{node.bandwidths['all']:.3g} GB/s" if "all" in node.bandwidths else "-"
        disk = f"{node.free_gib:.1f} GiB" if math.isfinite(node.free_gib) else "-"
        memory = f"{node.free_share:.0%}" if node.devices else "-"
        rows.append([node.host, gpus, memory, disk, f"{node.clock_s:+.2f} s", bandwidth])
    return align_columns(rows)


def describe_verdict(reasons: dict[str, list[str]], count: int) -> str:
    """Return the sentences on the nodes that are unfit."""
    each = "; ".join(f"{name} {', and '.join(texts)}" for name, texts in reasons.items())
    number = f"{len(reasons)} of {count} nodes are" if count > 1 else "the node is"
    return f"{number} unfit: {each}. Repair them, or submit without them: --sbatch=--exclude={','.join(reasons)}"


def preflight(words: list[str]) -> int:
    """Check devices, disk, shared folder, clocks and network of every node before a run, and name unfit nodes."""
    options = parse_options("preflight", summary_of(preflight), PreflightOptions, words)
    if options.timeout <= 0 or options.devices < -1:
        raise ConfigError("--timeout must be above 0, and --devices at least -1.")
    process, folder = read_process_info(), Path(options.folder)
    facts = look_at_node(process.rank, folder)
    bandwidth = options.bandwidth if options.bandwidth >= 0 else LEAST_BANDWIDTH[bool(facts.devices)]
    nodes, missing = [facts], list[int]()
    if process.world_size > 1:
        export_for_torch(process)  # srun's variables have other names, and rank 0 must know that it is not alone
        nodes, missing = Meeting(process.rank, process.world_size, folder, options.timeout).gather(facts, bandwidth)
    status = EXIT_OK
    if process.rank == 0:
        names = [name for name in options.nodes.split(",") if name]
        absent = [names[rank] if rank < len(names) else f"the node of rank {rank}" for rank in missing]
        limits = Limits(options.devices, options.free_memory, options.free_disk, options.clock_difference, bandwidth)
        print("\n".join(format_nodes(nodes)))
        reasons = judge_nodes(nodes, absent, limits)
        if options.unfit and 0 < len(reasons) < process.world_size:
            write_text(options.unfit, ",".join(reasons) + "\n")
        if reasons:
            print(f"rdt preflight: error: {describe_verdict(reasons, process.world_size)}", file=sys.stderr)
            status = EXIT_FAILED
        else:
            print(f"{process.world_size} nodes are fit" if process.world_size > 1 else f"{facts.host} is fit")
    if process.world_size > 1:
        leave_process(status)  # it may hold a process group
    return status
