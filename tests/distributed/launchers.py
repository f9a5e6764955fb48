"""Real launchers of `launch/pretrain.py`, started in the background: `rdt train`, torchrun, deepspeed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from launch.local_processes import find_free_port
from tests.distributed.processes import REPOSITORY

BIN = Path(sys.executable).parent
SCRIPT = REPOSITORY / "launch" / "pretrain.py"
FAULTY_SCRIPT = REPOSITORY / "tests" / "faults" / "faulty_rank.py"
SCRIPTS = {str(SCRIPT), str(FAULTY_SCRIPT)}
# More steps than any test waits for, none saved unless asked for.
ENDLESS = ["--train.steps=1000000", "--data.max_epochs=1e9", "--eval.every=0", "--checkpoint.every=0"]


def make_command(
    launcher: str, options: Sequence[str], launcher_options: Sequence[str] = (), script: Path = SCRIPT
) -> list[str]:
    """Return the command that starts two processes on this machine, or what `launcher_options` of torchrun or deepspeed say."""
    if launcher == "rdt train":
        return [sys.executable, "-m", "launch.cli", "train", *options, "--nproc=2"]
    port = f"{find_free_port()}"
    own = {
        "torchrun": ["--nproc-per-node=2", f"--master-port={port}"],
        "deepspeed": ["--num_gpus=2", "--master_addr=127.0.0.1", f"--master_port={port}"],
    }[launcher]
    return [str(BIN / launcher), *(launcher_options or own), str(script), *options]


class Launched:
    """A launcher in the background, and its workers.

    Attributes:
        process: of the launcher.
        output: file with the output of all.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process, self.output = process, output

    def has_ended(self) -> bool:
        """Return True if the launcher has ended."""
        return self.process.poll() is not None

    def read_output(self) -> str:
        """Return what the launcher and its workers have printed."""
        return self.output.read_text(errors="replace")

    def list_workers(self) -> list[psutil.Process]:
        """Return the processes that run the training script, by rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "LOCAL_RANK" in process.environ() and SCRIPTS & set(process.cmdline()[:4]):
                    found[int(process.environ()["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout: float) -> int:
        """Wait for the launcher's end and return its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.read_output()[-6000:]}") from None


def start_launcher(
    command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Launched]:
    """Start a launcher for the length of a block, as `start_command` does, with the variables that the tests need.

    Args:
        command: from `make_command`.
        output: file for the output of all.
        environment: further environment variables.
        prefix: words before the command, such as those that run it in a network namespace.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    variables |= {"PATH": f"{BIN}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
    return start_command([*prefix, *command], output, variables, REPOSITORY)


@contextlib.contextmanager
def start_command(
    command: Sequence[str], output: Path, variables: Mapping[str, str], folder: Path
) -> Iterator[Launched]:
    """Start a command for the length of a block; what it has started and still runs at its end is killed.

    Args:
        command: its words.
        output: file for the output of all.
        variables: of its environment, all of them.
        folder: where to run it.
    """
    mark = f"RDT_TEST_LAUNCH_{time.monotonic_ns()}"  # by which workers are found whose launcher has ended
    with open(output, "ab") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**variables, mark: "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Launched(process, output)
    finally:
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mark in other.environ():
                    other.send_signal(signal.SIGKILL)
        process.wait()
