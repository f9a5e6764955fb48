"""Options that prepare a corpus in parts and groups, and preps in processes, killed when they have written a file."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import working_directory_path

RUN = "import json,sys;from data_prep.pipeline import *;prepare(PrepConfig(**json.loads(sys.argv[1])))"


def config(source: Path, out: Path, **changes: object) -> PrepConfig:
    """Options for eight parts and several groups."""
    options = {"vocab_size": 330, "valid_fraction": 0.1, "workers": 1, "part_bytes": 9000, "shard_bytes": 5000}
    return PrepConfig(sources=[str(source)], out=str(out), **{**options, **changes})  # type: ignore[arg-type]


def start_prep(options: PrepConfig, repository: Path) -> subprocess.Popen:
    """Start a prep in a process of its own, which prints nothing."""
    words = [sys.executable, "-c", RUN, json.dumps(dataclasses.asdict(options))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=repository, **quiet)  # type: ignore[call-overload]


def kill_when(options: PrepConfig, file: str, repository: Path) -> bool:
    """Start a prep and kill it when a file of its working directory appears; return True if that was before its end.

    The workers that it started must end with it.
    """
    path = working_directory_path(Path(options.out)) / file
    with start_prep(options, repository) as process:
        while process.poll() is None and not path.exists():
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if workers:
            with contextlib.suppress(psutil.NoSuchProcess):  # prep is done, and one of them has ended meanwhile
                found = [each.net_connections("inet") for each in (psutil.Process(process.pid), *workers)]
                listening = {one.laddr.ip for each in found for one in each if one.status == psutil.CONN_LISTEN}
                assert listening == {"127.0.0.1"}
        process.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(workers, timeout=30)[1]
    return process.returncode == -signal.SIGKILL
