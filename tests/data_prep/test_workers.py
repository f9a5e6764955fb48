"""Prep whose workers die, take too much memory, fail or get a signal, on this machine and on several."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client

from data_prep import pipeline
from data_prep.jobs import dask_cluster
from data_prep.jobs.fork_server import hold_back_signals
from data_prep.jobs.progress import Progress
from data_prep.jobs.steps import Step
from data_prep.jobs.working_directory import Job, working_directory_path
from data_prep.pipeline import prepare
from data_prep.sources.inputs import Part
from data_prep.stages.scan import scan_part
from megatron_rdt.errors import DataError, LaunchError
from tests.data_prep.cluster_workers import open_cluster, write_kills
from tests.data_prep.killed_preps import config, kill_when, start_prep
from tests.data_prep.small_corpora import read_files, write_lines


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", ["scan/part-00001.json", "encode/part-00002-00.json"])
def test_killed_with_workers(stage: str, source: Path, undisturbed: Path, tmp_path: Path, repository: Path) -> None:
    """Workers end with the process that started them; the next prep has another number of workers."""
    kill_when(config(source, tmp_path / "out", workers=2), stage, repository)
    prepare(config(source, tmp_path / "out", workers=1))
    assert read_files(tmp_path / "out") == read_files(undisturbed)


def kill_process_once(marker: str, parent: bool, *arguments: object) -> None:
    """Scan a part, but before that kill this process, or the one it was forked from, if that has not been done yet."""
    with contextlib.suppress(FileExistsError), open(marker, "x"):
        process = psutil.Process(os.getppid() if parent else os.getpid())
        assert "forkserver" in " ".join(process.cmdline()), "it would be the prep or the tests"
        process.kill()
    scan_part(*arguments)  # type: ignore[arg-type]


def write_modules(folder: Path) -> Path:
    """Make a folder of modules that have the names of libraries, and write a file `imported` where they are imported."""
    folder.mkdir()
    for name in ("dask", "distributed", "numpy"):
        write_lines(folder / f"{name}.py", ["open('imported', 'w')"])
    return folder


def take_too_much_memory(begun: str, job: Job, part: Part) -> None:
    """Append the name of a step to a file, and take more than a worker's share."""
    with open(begun, "a") as file:
        file.write(f"scan-{part.name}\n")
    held = bytearray(b"x" * 700_000_000)
    time.sleep(50)
    raise AssertionError(f"{len(held)} bytes were allowed")


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("parent", [False, True], ids=["worker", "server"])
def test_the_step_of_a_killed_worker_is_repeated(
    parent: bool,
    source: Path,
    undisturbed: Path,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the process that forks them, all workers count as lost, and another one forks new ones.

    It imports no modules of the current folder either.
    """
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(write_modules(tmp_path / "text"))
    kill_once = functools.partial(kill_process_once, str(tmp_path / "marker"), parent)
    monkeypatch.setattr(pipeline, "scan_part", kill_once)
    prepare(config(source, tmp_path / "out", workers=2))
    assert read_files(tmp_path / "out") == read_files(undisturbed)
    assert sorted(os.listdir(tmp_path)) == ["marker", "out", "text"]
    assert not (tmp_path / "text" / "imported").exists()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_modules_in_the_current_folder_are_not_imported(
    source: Path, undisturbed: Path, tmp_path: Path, repository: Path
) -> None:
    """They may be the text, such as a checkout of a library that workers use."""
    write_modules(tmp_path / "text")
    script = "from data_prep.pipeline import prepare\nfrom tests.data_prep.killed_preps import *\n"
    script += f"options = config(Path({str(source)!r}), Path({str(tmp_path / 'out')!r}), workers=2)\n"
    script += "if __name__ == '__main__':\n    prepare(options)\n"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, str(tmp_path / "script.py")], cwd=tmp_path / "text", env=environment, check=True)
    assert not (tmp_path / "text" / "imported").exists()
    assert read_files(tmp_path / "out") == read_files(undisturbed)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_workers_start_where_no_socket_can_be_made(
    source: Path, undisturbed: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as in a folder for temporary files whose path is longer than that of a socket may be."""
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    with start_prep(config(source, tmp_path / "out", workers=2), repository) as process:
        assert process.wait() == 0
    assert read_files(tmp_path / "out") == read_files(undisturbed)
    assert not [*(tmp_path / ("x" * 100)).glob("pymp-*")]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_worker_has_one_step_at_a_time(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So if it dies, no step that only waited there counts as failed."""
    most, run_steps = [], dask_cluster._run_steps

    def run_and_watch(client: Client, job: Job, steps: list[Step], progress: Progress) -> None:
        def look() -> None:
            most.append(max(len(keys) for keys in client.processing().values()))

        monkeypatch.setattr(progress, "show", look)
        run_steps(client, job, steps, progress)

    monkeypatch.setattr(dask_cluster, "_run_steps", run_and_watch)
    prepare(config(source, tmp_path / "out", workers=2))
    assert max(most) == 1
    assert read_files(tmp_path / "out") == read_files(undisturbed)


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_step_that_needs_too_much_memory_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a job of Slurm that has 1,200 MiB: its kernel may kill anything, so workers stay below their shares.

    It was really begun so often, and did not merely wait for a worker that died.
    """
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1200")
    begun = tmp_path / "begun"
    monkeypatch.setattr(pipeline, "scan_part", functools.partial(take_too_much_memory, str(begun)))
    named = r"^scan-part-0000\d was given to 3 worker processes, .* more than its share of the memory"
    with pytest.raises(DataError, match=named) as raised:
        prepare(config(source, tmp_path / "out", workers=2))
    assert begun.read_text().splitlines().count(str(raised.value).split()[0]) == 3
    assert os.listdir(tmp_path) == ["begun"]


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_signal_ends_all_processes(
    sent: signal.Signals, source: Path, undisturbed: Path, tmp_path: Path, repository: Path
) -> None:
    """Without a word of Dask's, and what is done is kept."""
    options = config(source, tmp_path / "out", workers=2)
    changed = {"sources": str(source), "out": options.out, "vocab_size": 330, "valid_fraction": 0.1, "workers": 2}
    changed |= {"part_bytes": 9000, "shard_bytes": 5000}
    words = ["prep", *(f"--{name}={value}" for name, value in changed.items())]
    record = working_directory_path(tmp_path / "out") / "scan" / "part-00001.json"
    command = [sys.executable, "-m", "launch.cli", *words]
    with subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True) as process:
        while not record.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert process.returncode == 128 + sent
    lines = [line for line in said.splitlines() if not line.startswith(("scan: ", "duplicates: ", "tokenizer: "))]
    assert lines == [f"rdt prep: interrupted by {sent.name}; what is done is kept, the same command goes on"]
    prepare(dataclasses.replace(options, workers=1))
    assert read_files(tmp_path / "out") == read_files(undisturbed)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_while_workers_start(sent: signal.Signals) -> None:
    """Half a cluster cannot be closed."""
    reached: list[str] = []

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    def be_interrupted() -> None:
        with hold_back_signals():
            os.kill(os.getpid(), sent)
            time.sleep(0.1)
            reached.append("the end of the start")

    before = signal.signal(sent, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt, match=str(int(sent))):
            be_interrupted()
        assert reached == ["the end of the start"]
        assert signal.getsignal(sent) is interrupt
    finally:
        signal.signal(sent, before)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_the_error_of_a_worker_is_said_as_it_is(tmp_path: Path, repository: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", ['{"text": "good"}', "{"])
    words = ["prep", "--sources", str(bad), "--out", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], cwd=repository, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("scan: ")]
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert lines[0].startswith("rdt prep: error: ")
    assert "bad.jsonl:2 (byte 17): not valid JSON" in lines[0]
    assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_machines(
    source: Path, undisturbed: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler has two workers. The main process is killed; then a worker, and the scheduler loses a machine for good."""
    (tmp_path / "cluster").mkdir()
    with open_cluster(tmp_path / "cluster", 2) as (scheduler, machines):
        options = config(source, tmp_path / "out", workers=0, scheduler=scheduler)
        assert kill_when(options, "scan/part-00002.json", repository)
        write_kills(tmp_path / "cluster" / "kills", [(3, True), (5, False)])
        with start_prep(options, repository) as process:
            while not (working_directory_path(tmp_path / "out") / "encode").exists():
                assert process.poll() is None
                time.sleep(0.001)
            for worker in psutil.Process(machines[0].pid).children(recursive=True):
                worker.kill()
            machines[0].kill()
            assert process.wait() == 0
        assert read_files(tmp_path / "out") == read_files(undisturbed)
    monkeypatch.setattr(dask_cluster, "CONNECT_S", 0.5)
    with pytest.raises(LaunchError, match=r"scheduler\.json does not exist. Start a scheduler with `dask scheduler"):
        prepare(dataclasses.replace(options, out=str(tmp_path / "other")))
