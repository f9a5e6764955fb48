"""Run a benchmark's script once more: in a fresh process, or as the ranks of a process group."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.local_processes import find_free_port

ROOT = Path(__file__).resolve().parents[2]
# glibc: larger blocks are mapped one by one, so they are returned to the system when they are freed. Otherwise its cache of
# freed blocks would count as memory of the model.
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LAST_CHARACTERS = 4000


def run_fresh(script: str, *words: str, return_freed_blocks: bool = False) -> Any:
    """Run a script in a process of its own and return the JSON of its last line; exit with its errors if it fails.

    Args:
        script: path of the script.
        words: its command line.
        return_freed_blocks: for measuring resident memory.
    """
    environment = os.environ | (RETURN_FREED_BLOCKS if return_freed_blocks else {})
    return json.loads(_run_or_exit([sys.executable, str(Path(script).resolve()), *words], environment).splitlines()[-1])


def run_ranks(script: str, processes: int, *words: str) -> Any:
    """Run a script as every rank of a process group; return the JSON that rank 0 writes to --worker, or exit.

    Args:
        script: path of the script; it joins the group itself.
        processes: number of ranks.
        words: its further command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += [f"--master-port={find_free_port()}", str(Path(script).resolve()), f"--worker={result}", *words]
        _run_or_exit(command, os.environ.copy())
        return json.loads(result.read_text(encoding="utf-8"))


def _run_or_exit(command: list[str], environment: dict[str, str]) -> str:
    """Run a command and return what it printed; if it fails, exit with its last errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-LAST_CHARACTERS:]}")
    return done.stdout
