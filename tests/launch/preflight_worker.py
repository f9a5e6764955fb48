"""A process of `rdt preflight` on one of several nodes that are all this machine; some have a fault."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch import node_checks
from launch.cli import run_command


def delay(send: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes half a second more."""

    def send_slowly(*words: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return send(*words, **options)

    return send_slowly


def preflight(size: int, faults: dict[int, str], port: int, folder: Path, words: list[str]) -> int:
    """Run the command as node `n<rank>`; return its status, and write what it says to files.

    Args:
        size: number of processes.
        faults: by rank: late, apart (another folder), clock, slow.
        port: at which they meet.
        folder: of the run and the outputs.
        words: more options.
    """
    rank = int(os.environ["RANK"])
    os.environ.update(SLURMD_NODENAME=f"n{rank}", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
    os.environ.update(LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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
