"""Two jobs on one run folder, from two hosts: the second is refused while the first lives, and takes over after its death.

Where the first was only stopped, it ends as soon as it goes on.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt import locks
from megatron_rdt.errors import EXIT_PREEMPTED
from megatron_rdt.files import read_json_lines
from megatron_rdt.train import resume_checks
from tests.checkpoint.runs import checkpoint_path, read_losses
from tests.distributed.processes import Ranks, start_ranks
from tests.distributed.training import run_pretrain, wait_for_step
from tests.faults.conftest import RecordCost

CLONE_NEWUTS = 0x04000000
NOT_ALLOWED = 77
BEAT_S, STALE_S, PATIENCE_S = 0.3, 3.0, 1.0
ENDLESS = [
    "--run.name=r",
    "--resume=auto",
    "--train.steps=100000",
    "--data.max_epochs=1000000",
    "--schedule.name=constant",
]


def run_on_host(words: Sequence[str], host: str, has_locks: bool) -> NoReturn:
    """Train on this rank as on a host of that name, on a file system with locks or without."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS):
        raise SystemExit(NOT_ALLOWED)
    socket.sethostname(host)
    locks.BEAT_S, locks.STALE_S, resume_checks.LOCK_PATIENCE_S = BEAT_S, STALE_S, PATIENCE_S

    def refuse(descriptor: int, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not has_locks:
        fcntl.flock = refuse
    run_pretrain(words)


def wait_for_six_steps(run: Path, first: Ranks) -> None:
    """Wait until the first job has done six steps; skip the test where it may not have a host name of its own."""
    wait_for_step(run, 6, first.has_ended)
    if NOT_ALLOWED in [process.exitcode for process in first.processes]:
        pytest.skip("a host name of its own (unshare --uts) is not allowed here")


@contextlib.contextmanager
def start_on_host(options: list[str], host: str, has_locks: bool) -> Iterator[Ranks]:
    """Start two ranks on a host for the length of a block."""
    with start_ranks(run_on_host, 2, options, host, has_locks, group=False) as ranks:
        yield ranks


@pytest.mark.faults
@pytest.mark.timeout(280)
@pytest.mark.parametrize("has_locks", [True, False])
def test_the_second_job_is_refused(
    has_locks: bool, tmp_path: Path, faulty_options: list[str], record_cost: RecordCost
) -> None:
    options, run = [*faulty_options, *ENDLESS, f"--run.root={tmp_path}", "--checkpoint.every=5"], tmp_path / "r"
    with start_on_host(options, "node-a", has_locks) as first:
        wait_for_six_steps(run, first)
        before = len(read_losses(run))
        with start_on_host(options, "node-b", has_locks) as second:
            second.processes[0].join(120)
            assert second.processes[0].exitcode == 1, second.format_report()
            refused = second.read_output(0)
        assert f"another process is writing {run}. Wait for it, end it, or choose another --run.name." in refused
        assert f" It is process {first.processes[0].pid} of " in refused
        assert "on node-a, for " in refused
        wait_for_step(run, before + 6, first.has_ended)
        assert not first.has_ended(), first.format_report()
        # Killed, it leaves its lock file.
        first.kill(0)
        first.kill(1)
    assert (run / ".lock").exists()
    reached, began = max(read_losses(run)), time.monotonic()
    options += [f"--train.steps={reached + 2}"]
    with start_on_host(options, "node-b", has_locks) as third:
        wait_for_taking(run, third)
        waited = time.monotonic() - began
        assert third.wait(120) == [0, 0], third.format_report()
    assert waited > STALE_S
    assert list(read_losses(run)) == list(range(1, reached + 3))
    checkpoints.verify(checkpoint_path(run, reached + 2))
    kind = "with" if has_locks else "without"
    record_cost(f"a second job from another host, file system {kind} locks", None, 0)


@pytest.mark.faults
@pytest.mark.timeout(280)
def test_a_job_that_was_stopped_ends_where_another_has_taken_over(
    tmp_path: Path, faulty_options: list[str], record_cost: RecordCost
) -> None:
    """Both its ranks, before it writes anything; what the other writes is that of a run alone."""
    options, run = [*faulty_options, *ENDLESS, f"--run.root={tmp_path}", "--checkpoint.every=1"], tmp_path / "r"
    with start_on_host(options, "node-a", False) as first:
        wait_for_six_steps(run, first)
        for process in first.processes:
            os.kill(process.pid or 0, signal.SIGSTOP)
        with start_on_host(options, "node-b", False) as second:
            wait_for_taking(run, second)
            before = max(read_losses(run))
            wait_for_step(run, before + 3, second.has_ended)
            for process in first.processes:
                os.kill(process.pid or 0, signal.SIGCONT)
            for process in first.processes:
                process.join(120)
            assert [process.exitcode for process in first.processes] == [1, 1], first.format_report()
            said = first.read_output(0)
            assert f"error (rank 0): another process has taken over the lock {run / '.lock'}" in said
            assert f" It is process {second.processes[0].pid} of " in said
            assert "on node-b, for " in said
            reached = max(read_losses(run))
            wait_for_step(run, reached + 3, second.has_ended)
            assert not second.has_ended(), second.format_report()
            assert f'"pid": {second.processes[0].pid},' in (run / ".lock").read_text()
            assert not (run / "failure.json").exists()
            assert "was moved, deleted or replaced" not in second.read_output(0)
            for process in second.processes:
                os.kill(process.pid or 0, signal.SIGTERM)
            assert second.wait(120) == [EXIT_PREEMPTED] * 2, second.format_report()
    steps = [record["step"] for _, _, record in read_json_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    checkpoints.verify(checkpoint_path(run, len(steps)))
    record_cost("a job that is stopped while another host's takes its run over", None, 0)


def wait_for_taking(run: Path, ranks: Ranks) -> None:
    """Return when rank 0 of these ranks has the lock."""
    while f'"pid": {ranks.processes[0].pid},' not in (run / ".lock").read_text():
        assert not ranks.has_ended(), ranks.format_report()
        time.sleep(0.02)
