"""Workers that fail, die or are interrupted: one message, the right exit status, and no process is left."""

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from launch.failures import LostPeerError, explain
from launch.local_processes import find_free_port
from megatron_rdt.train.stop_request import REPEAT_S

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]
LONG = ["--train.steps=100000", "--data.max_epochs=1e9", "--eval.every=0", "--checkpoint.every=0"]
TWO = ["--parallel.engine=fsdp", "--nproc=2"]


def damage_corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    """Copy a corpus with shards cut short, which only the workers notice."""
    corpus = tmp_path / "corpus"
    for path in sorted(tiny_corpus.rglob("*")):
        target = corpus / path.relative_to(tiny_corpus)
        if path.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[: -2 if path.suffix == ".bin" else None])
    return corpus


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_an_error_of_all_ranks_is_printed_once(
    rdt: Run, tiny_options: list[str], tiny_corpus: Path, tmp_path: Path
) -> None:
    words = [*tiny_options, *TWO, f"--run.root={tmp_path}", f"--data.path={damage_corpus(tiny_corpus, tmp_path)}"]
    result = rdt("train", *words)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"rdt train: error: {tmp_path}")
    assert "the manifest says" in result.stderr
    wrong = rdt("train", *tiny_options, *TWO, f"--run.root={tmp_path}", "--model.vocab_size=500")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "Set --model.vocab_size 512" in wrong.stderr


@pytest.fixture
def running(
    repository: Path, tiny_options: list[str], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Function that starts a long run on two processes, in a new process group, and waits until it trains."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = [*tiny_options, *LONG, *TWO, f"--run.root={tmp_path}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", *words],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(rank: int, running: Callable[[], subprocess.Popen[str]]) -> None:
    process = running()
    workers = sorted(psutil.Process(process.pid).children(), key=lambda worker: int(worker.environ()["RANK"]))
    assert len(workers) == 2
    workers[rank].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137
    assert len(errors.splitlines()) == 1
    assert f"rank {rank} was killed by SIGKILL" in errors
    assert "--resume auto" in errors
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["launcher", "terminal"])
def test_ctrl_c_saves_and_twice_ends_at_once(
    send: Callable[[int, int], None], running: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = running()
    workers = psutil.Process(process.pid).children()
    if send == os.killpg:
        workers[0].suspend()  # so that the others wait for it when they save
        send(process.pid, signal.SIGINT)
        time.sleep(REPEAT_S + 2)
    send(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    if send == os.killpg:
        assert (process.returncode, errors) == (130, "rdt train: interrupted\n")
    else:
        assert process.returncode == 75, errors
        assert "stopped on SIGTERM at step" in output
        assert (tmp_path / "run" / "latest").exists()
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)


# Of a worker that does not listen yet; what ends it is the signal.
DEAF = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], os.environ['RANK']).touch(); time.sleep(1000)"
START = "import sys, pathlib; from launch.local_processes import run_processes; "
START += "sys.exit(run_processes(sys.argv[2:], 2, script=pathlib.Path(sys.argv[1])))"


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_workers_that_are_asked_to_stop_before_they_listen(
    number: signal.Signals, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [sys.executable, "-c", START, str(tmp_path / "deaf.py"), str(tmp_path)]
    with subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    name = "SIGTERM" if number == signal.SIGINT else number.name
    line = f"stopped on {name} before the first step, with nothing new to save; start again with the same options\n"
    assert (process.returncode, errors) == (75, line)


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_workers_end_with_a_killed_launcher(running: Callable[[], subprocess.Popen[str]]) -> None:
    process = running()
    workers = psutil.Process(process.pid).children()
    process.kill()
    output, _ = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert (len(workers), alive) == (2, [])
    assert "stopped on the end of its launcher at step" in output


def test_a_port_in_use_is_refused_before_any_worker(rdt: Run, tiny_options: list[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = rdt("train", *tiny_options, *TWO, f"--run.root={tmp_path}", f"--master_port={port}")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"rdt train: error: port {port} is in use. Choose another --master_port, or 0 for any free one."
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_errors_under_torchrun(repository: Path, tiny_options: list[str], tmp_path: Path) -> None:
    launcher = [Path(sys.executable).parent / "torchrun", "--nproc-per-node=2", f"--master-port={find_free_port()}"]
    words = [*tiny_options, "--parallel.engine=fsdp", f"--run.root={tmp_path}", "--depth.meen=3"]
    result = subprocess.run(
        [*map(str, launcher), "launch/pretrain.py", *words],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    ours = [line for line in result.stderr.splitlines() if "pretrain.py: error" in line]
    assert ours == ["pretrain.py: error (rank 0): option --depth.meen does not exist. Did you mean depth.mean?"]
    assert "load.py" not in result.stderr  # the traceback is torchrun's own
    assert result.returncode != 0


@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.distributed)])
def test_out_of_host_memory(engine: str, repository: Path, tiny_options: list[str], tmp_path: Path) -> None:
    """A matrix of 17 GB where a process may have 16 GB."""
    options = [*tiny_options, f"--run.root={tmp_path}", "--model.dim=65536", f"--parallel.engine={engine}"]
    options += ["--nproc=2"] if engine == "ddp" else []
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *options],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30)),
    )
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "is out of memory (an allocation of 17.18 GB failed)" in result.stderr


def test_errors_of_libraries_are_explained() -> None:
    lost = explain(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert isinstance(lost, LostPeerError)
    full = explain(OSError(28, "No space left on device", "/runs/a"))
    assert re.fullmatch(
        r"the disk is full \([\d.]+ MiB free\): .*No space left on device: '/runs/a'\. Free space, and start again\.",
        str(full),
    )
    for number, remedy in (
        (errno.EFBIG, "ulimit -f"),
        (errno.EDQUOT, "Delete files that count against the quota"),
        (errno.EIO, "Check the disk"),
        (errno.ENAMETOOLONG, "Choose a shorter path"),
    ):
        explained = explain(OSError(number, os.strerror(number), "/runs/a"))
        assert os.strerror(number) in str(explained)
        assert remedy in str(explained)
    for without_memory in (
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**13,), np.dtype(np.int64)),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes."
        ),
        RuntimeError("std::bad_alloc"),
    ):
        explained = explain(without_memory)
        assert explained is not None
        assert str(explained).startswith("this machine, or this job's share of it, is out of memory (")
        assert "--train.micro_batch" in str(explained)
        assert "--workers" in str(explained)
    gpu = explain(RuntimeError("CUDA error: out of memory"))
    assert gpu is not None
    assert str(gpu).startswith("out of GPU memory (CUDA error: out of memory)")
    denied = explain(PermissionError(13, "Permission denied", "/runs/a"))
    assert str(denied) == "/runs/a: Permission denied. Choose a path that you can read and write."
    assert explain(KeyError("a bug")) is None
    assert explain(RuntimeError("a bug")) is None
    assert explain(FileNotFoundError(2, "No such file", "/runs/a")) is None
    kernel = explain(FileNotFoundError(2, "No such file", "/proc/runs/a"))
    assert kernel is not None
    assert "/proc/runs/a: No such file. Choose a path" in str(kernel)
