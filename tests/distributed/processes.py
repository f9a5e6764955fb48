"""Run a function on N processes with a Gloo group, without starting Python and importing torch N times.

The processes are forked from one that has imported everything and done nothing else (Python's fork server), so they
start in a tenth of a second where `torchrun` takes five. This is for tests of ranks that compute together; a launcher is
tested by starting it. A rank that forks once more loses the threads of its group: start such code without a group.

    def add_ranks(number: int) -> float:                       # at the top level of a module
        tensor = torch.tensor(float(number + dist.get_rank()))
        dist.all_reduce(tensor)
        return tensor.item()

    @pytest.mark.distributed
    @pytest.mark.timeout(60)
    def test_sums() -> None:
        assert run_on_processes(add_ranks, 4, 10, timeout=50) == [46.0] * 4
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from megatron_rdt.environment import leave_process

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1
# Variables by which a launcher tells a process its rank; the last two say that the store exists already.
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)
GRACE_S = 5.0  # left to the other ranks after the first failure, so that they report where they waited
DUMP_S = 1.0
LAST_CHARACTERS = 6000


class Ranks:
    """The processes of one call, with their output and results.

    Attributes:
        processes: one per rank; `exitcode` is None while it runs, and minus the signal that ended it.
    """

    def __init__(self, folder: Path, store: dist.TCPStore) -> None:
        self.folder, self.store = folder, store
        self.processes: list[BaseProcess] = []

    def read_output(self, rank: int) -> str:
        """The text that a rank has printed so far, both streams."""
        return (self.folder / f"output-{rank}").read_text(errors="replace")

    def read_result(self, rank: int) -> Any:
        """The value that the function returned on this rank."""
        return pickle.loads((self.folder / f"result-{rank}").read_bytes())

    def has_ended(self) -> bool:
        """Return True if any rank has ended."""
        return any(process.exitcode is not None for process in self.processes)

    def kill(self, rank: int) -> None:
        """Kill one rank and the processes it started, with SIGKILL."""
        process = self.processes[rank]
        assert process.pid is not None
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()

    def wait(self, timeout: float) -> list[int]:
        """Wait until all ranks have ended, or kill those left after the timeout or a failure; return the exit statuses.

        Raises:
            TimeoutError: after `timeout` seconds; the message has the stack of every rank. None is left running.
        """
        end, failed = time.monotonic() + timeout, False
        while waiting := [process for process in self.processes if process.exitcode is None]:
            multiprocessing.connection.wait([process.sentinel for process in waiting], end - time.monotonic())
            if not failed and any(process.exitcode for process in self.processes):
                end, failed = min(end, time.monotonic() + GRACE_S), True
            if time.monotonic() >= end:
                break
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in hanging:
            os.kill(self.processes[rank].pid or 0, signal.SIGABRT)  # faulthandler writes its stack
        for rank in hanging:
            self.processes[rank].join(DUMP_S)
            self.kill(rank)
        if hanging and not failed:
            raise TimeoutError(f"ranks {hanging} still ran after {timeout} s.\n{self.format_report()}")
        return [process.exitcode or 0 for process in self.processes]

    def format_report(self) -> str:
        """Text with the status and last output of every rank; ranks that failed come before ranks that were killed."""
        order = sorted(range(len(self.processes)), key=lambda rank: (self.processes[rank].exitcode or 0) <= 0)
        return "\n".join(
            f"--- rank {rank} of {len(order)}, exit status {self.processes[rank].exitcode}:\n"
            f"{self.read_output(rank)[-LAST_CHARACTERS:]}"
            for rank in order
        )


@contextlib.contextmanager
def start_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    group: bool = True,
) -> Iterator[Ranks]:
    """Start the processes of `run_on_processes` for the length of a block; those that still run at its end are killed.

    Args:
        function, world_size, arguments, environment: see `run_on_processes`.
        group: join a Gloo group before the function is called; otherwise the function may, from RANK, MASTER_PORT, ...
    """
    context = _prepare_fork_server()
    # This process keeps the store, on a port that the system chose: no race for a free port, and no rank must end last.
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **dict(
            zip(
                LAUNCHER_VARIABLES,
                ("", "", *[str(world_size)] * 2, LOOPBACK, str(store.port), "True", "0"),
                strict=True,
            )
        ),
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = Ranks(Path(folder), store)
        try:
            for rank in range(world_size):
                (ranks.folder / f"output-{rank}").touch()
                own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                words = (function, arguments, ranks.folder, own, os.getcwd(), group)
                process = context.Process(target=_run_rank, args=words, daemon=False)
                process.start()
                ranks.processes.append(process)
            yield ranks
        finally:
            for rank in range(len(ranks.processes)):
                ranks.kill(rank)


def run_on_processes(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a Gloo group and return what each rank returned, by rank.

    Args:
        function: at the top level of a module, since it is pickled by name. The module is imported anew in every process
            unless tests/distributed/warm.py has imported it already.
        world_size: number of processes; each has one thread.
        arguments: anything that pickles.
        timeout: seconds for all, after which every rank is killed.
        environment: further environment variables. One that a library reads when it is imported comes too late.

    Raises:
        AssertionError: a rank raised, exited or was killed; the message has the output of every rank.
        TimeoutError: the message has the stack of every rank.
    """
    with start_ranks(function, world_size, *arguments, environment=environment) as ranks:
        statuses = ranks.wait(timeout)
        assert statuses == [0] * world_size, ranks.format_report()
        return [ranks.read_result(rank) for rank in range(world_size)]


def forget_launcher() -> None:
    """Make this rank, started with `group` False, one that no launcher started."""
    for name in LAUNCHER_VARIABLES:
        del os.environ[name]


def _prepare_fork_server() -> Any:
    """Start the fork server, which imports tests/distributed/warm.py, and return the context that forks from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.warm"])
    before = dict(os.environ)
    # The server starts at the first call and reads these then: path of the modules, one thread, no accelerator.
    os.environ.update(
        PYTHONPATH=os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run_rank(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: Path,
    environment: dict[str, str],
    directory: str,
    group: bool,
) -> None:
    """Run a rank from start to exit: redirect its output, join the group, call the function, save its result."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = environment["RANK"]
    with open(folder / f"output-{rank}", "ab", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        _reset_threads_and_seeds()
        if group:
            dist.init_process_group("gloo")
        result = function(*arguments)
        if group:
            dist.barrier()
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    leave_process(status)


def _reset_threads_and_seeds() -> None:
    """Undo what a fork inherits: thread counts and the states of random generators."""
    torch.set_num_threads(1)
    for seed in (random.seed, numpy.random.seed):
        seed()
    torch.seed()
