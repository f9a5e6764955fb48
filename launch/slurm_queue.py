"""Slurm's queue: the states of jobs by their numbers."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

QUEUE_TIMEOUT_S = 30
INVALID = "Invalid job id"  # of a job that ended so long ago that Slurm has forgotten it


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs.

    Attributes:
        job: its number, of an array's task with the task's: 12_3.
        state: as Slurm names it, such as PENDING.
        nodes: on which it runs.
        reason: why it waits.
    """

    job: str
    state: str
    nodes: str
    reason: str


def read_queue(jobs: Sequence[str]) -> tuple[dict[str, QueuedJob], str]:
    """Return those of the jobs that Slurm still has, by number, and a sentence if it could not be asked."""
    if not jobs:
        return {}, ""
    if shutil.which("squeue") is None:
        return {}, "squeue is not on this machine, so jobs are left out and a run that waits for one is not seen."
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%i|%T|%N|%r"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=QUEUE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"squeue did not answer ({error}), so jobs are left out."
    if result.returncode and INVALID not in result.stderr:
        return {}, f"squeue failed ({result.stderr.strip() or result.returncode}), so jobs are left out."
    found = [line.split("|", 3) for line in result.stdout.splitlines() if line.count("|") >= 3]
    return {words[0].strip(): QueuedJob(*(word.strip() for word in words)) for words in found}, ""
