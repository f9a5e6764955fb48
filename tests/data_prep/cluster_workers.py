"""A Dask cluster in processes of its own, as on other machines, and workers that die at the renames that a file names."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KILLS = "RDT_TEST_KILLS"
START_S = 60.0


@contextlib.contextmanager
def open_cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Start a scheduler and so many workers, one nanny each; yield the scheduler file and the nannies' processes.

    The workers die at the renames that `write_kills` orders, and are restarted by their nannies.
    """
    file, kills = folder / "scheduler.json", folder / "kills"
    write_kills(kills, [])
    settings = {"SCHEDULER__ALLOWED_FAILURES": "10", "WORKER__MEMORY__PAUSE": "False"}
    environment = {**os.environ, KILLS: str(kills)} | {f"DASK_DISTRIBUTED__{k}": v for k, v in settings.items()}
    common = ["--scheduler-file", str(file), "--no-dashboard", "--host", "127.0.0.1"]
    worker = ["--nthreads", "1", "--preload", __file__, "--local-directory", str(folder / "scratch")]
    commands = [["scheduler", "--port", "0", *common], *[["worker", *common, *worker]] * workers]
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            words = [sys.executable, "-m", "dask", *command]
            with open(folder / f"{len(processes)}.log", "wb") as log:
                processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + START_S
        while not file.exists():
            assert time.monotonic() < deadline, (folder / "0.log").read_text()
            time.sleep(0.05)
        yield str(file), processes[1:]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def write_kills(file: Path, kills: list[tuple[int, bool]]) -> None:
    """Order the death of a worker at the n-th rename from now, counted over all workers, before it or after; and so on."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(kills, temporary)
    os.replace(temporary.name, file)


def _take_kill(file: Path) -> bool | None:
    """Count a rename; return whether to die before it (True) or after it (False), None to live."""
    with open(file, "r+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        kills = json.load(opened)
        if not kills:
            return None
        kills[0][0] -= 1
        before = kills.pop(0)[1] if kills[0][0] == 0 else None
        opened.seek(0)
        opened.truncate()
        json.dump(kills, opened)
        return before


def dask_setup(worker: object) -> None:
    """Make the renames of this worker count; Dask calls it when the worker starts."""
    file, replace = Path(os.environ[KILLS]), os.replace

    def replace_or_die(source: object, target: object, **folders: object) -> None:
        kill = _take_kill(file)
        if kill is True:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **folders)  # type: ignore[arg-type]
        if kill is False:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = os.rename = replace_or_die  # type: ignore[assignment]
