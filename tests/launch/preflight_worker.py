"""A process of `rdt preflight` on one of several nodes that are all this machine; some have a fault."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from launch import node_checks
from launch.cli import run_command
from megatron_rdt.parallel import process_group
from tests.distributed.processes import forget_launcher

SERVE_STORE = process_group.serve_store


def delay(send: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes half a second more."""

    def send_slowly(*words: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return send(*words, **options)

    return send_slowly


def serve_and_tell(*words: Any, **options: Any) -> dist.TCPStore:
    """Serve the store by which the processes meet, and print where this one listens."""
    store = SERVE_STORE(*words, **options)
    found = psutil.Process().net_connections("inet")
    print("listens at", *(each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN))
    return store


def preflight(size: int, faults: dict[int, str], port: int, folder: Path, words: list[str]) -> int:
    """Run the command as node `n<rank>`, started as srun does; return its status, and write what it says to files.

    Args:
        size: number of processes.
        faults: by rank: late, apart (another folder), clock, slow.
        port: at which they meet.
        folder: of the run and the outputs.
        words: more options.
    """
    rank = int(os.environ["RANK"])
    forget_launcher()
    os.environ.update(SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_NTASKS=str(size), SLURM_LOCALID="0")
    os.environ.update(SLURM_STEP_TASKS_PER_NODE=f"1(x{size})", SLURMD_NODENAME=f"n{rank}")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    process_group.serve_store = serve_and_tell
    node_checks.SEEN_WITHIN_S = 2.0
    fault, run = faults.get(rank, ""), folder / "run"
    if fault == "late":
        return 0
    if fault == "apart":
        run = folder / f"run{rank}"
    if fault == "clock":
        real = time.time
        time.time = lambda: real() + 60
    if fault == "slow":
        for name in ("all_reduce", "send"):
            setattr(dist, name, delay(getattr(dist, name)))
    return run_command(["preflight", "--folder", str(run), "--free_disk", "0.001", *words])
