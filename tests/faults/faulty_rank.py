"""The training script with a fault: one rank dies, hangs or is slow at a moment of the run.

    RDT_TEST_FAULT="die save 1" torchrun --nproc-per-node 2 tests/faults/faulty_rank.py OPTIONS

The fault comes at the second call of the moment's function on that rank, or the first for what is called once. The rank
writes `reached` into the folder RDT_TEST_FOLDER, if there is one.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from launch.pretrain import main
from megatron_rdt.environment import leave_process, read_restart_count

LONG_S, SLOW_S = 1000.0, 0.02
# Function that is called at the moment, and the number of the call.
MOMENTS = {
    "data": ("megatron_rdt.train.trainer", "open_training_data", 1),  # before the first step
    "load": ("megatron_rdt.checkpoint.restore", "restore_engine", 1),
    "save": ("megatron_rdt.checkpoint.write", "_write_files", 2),  # files of the engine are written, nothing is named
    "evaluate": ("megatron_rdt.train.inspections", "score_tasks", 1),
    "step": ("megatron_rdt.model.core", "RecurrentCore.iterate", 30),
}
FAULTS: dict[str, Callable[[], object]] = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(LONG_S),
    "slow": lambda: time.sleep(SLOW_S),  # each time from then on
}


def inject(fault: str, moment: str) -> None:
    """Let this rank do what the fault is at a moment of the run."""
    module, name, number = MOMENTS[moment]
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, last), [0]

    def act(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            folder = os.environ.get("RDT_TEST_FOLDER")
            if folder:
                (Path(folder) / "reached").write_text(str(time.time()))
            FAULTS[fault]()
        return function(*arguments, **named)

    setattr(owner, last, act)
    for each in list(sys.modules.values()):  # those that have imported it by name
        if getattr(each, "__dict__", {}).get(last) is function:
            setattr(each, last, act)


def train_with_fault(words: list[str]) -> NoReturn:
    """Run the training script with the fault that RDT_TEST_FAULT describes, on the rank that it names, or on "all"."""
    fault, moment, rank = os.environ["RDT_TEST_FAULT"].split()
    if rank in ("all", os.environ["RANK"]) and not (fault == "die" and read_restart_count()):  # or it always would
        import megatron_rdt.train.trainer  # noqa: F401

        inject(fault, moment)
    raise SystemExit(main(words))


if __name__ == "__main__":
    try:
        train_with_fault(sys.argv[1:])
    except SystemExit as end:
        leave_process(int(end.code or 0))
