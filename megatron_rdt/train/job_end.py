"""The end of the Slurm job that a run is in, for a job that asks for no signal before it, or whose signal is lost.

Slurm 23.02 and later give it to the job's processes (SLURM_JOB_END_TIME); where that is missing or over, `squeue` is asked. It
is asked again when the moment comes, since the job may have been extended. Once the run has started, only the monotonic
clock and the difference of two times of Slurm's count, so a clock that jumps changes nothing.
"""

import math
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import datetime

from megatron_rdt.environment import read_slurm_job
from megatron_rdt.terminal import format_duration, show_line

LARGEST_SHARE = 0.25  # of the time that a job has left at the start of the run: a short one is to train, too
LONGEST_PAUSE_S = 3600.0
SQUEUE_TIMEOUT_S = 20
NO_END = "NONE"  # squeue's word for the end of a job without a time limit


def wait_for_job_end(before_s: float, pause: Callable[[float], bool]) -> bool:
    """Wait until `before_s` seconds before the end of this Slurm job, or a quarter of what is left of it; return True then.

    Args:
        before_s: seconds.
        pause: waits for so many seconds; returns True if nobody wants to know any more.

    Returns:
        False after `pause` has returned True, and where there is no end to wait for.
    """
    job, text = read_slurm_job()
    end = _find_job_end(job, text) if job or text else math.inf
    if not math.isfinite(end):
        return False
    left = end - time.time()
    before_s = min(before_s, LARGEST_SHARE * left)
    moment = time.monotonic() + left - before_s
    show_line(
        f"this Slurm job ends in {format_duration(left)}; the run saves and stops {format_duration(before_s)} before that "
        "(checkpoint.before_job_end_s)"
    )
    while True:
        while (wait_s := moment - time.monotonic()) > 0:
            if pause(min(wait_s, LONGEST_PAUSE_S)):
                return False
        later = ask_job_end(job)
        if later is None or later <= end:
            return True
        if math.isinf(later):
            show_line("this Slurm job has no time limit any more; the run goes on")
            return False
        show_line(f"this Slurm job was extended by {format_duration(later - end)}; the run goes on")
        moment, end = moment + later - end, later


def _find_job_end(job: str, text: str) -> float:
    """Return the end of this job in seconds since 1970; infinity if it has none, or, with a warning, where it is not known.

    Args:
        job: its number, or "".
        text: SLURM_JOB_END_TIME, or "".
    """
    is_number = text.isascii() and text.isdecimal()
    end = float(text) if is_number else 0.0
    if end <= time.time():
        end = ask_job_end(job) or 0.0
    if end > time.time():
        return end
    found = (
        f"SLURM_JOB_END_TIME is {text!r}{', which is over' * is_number}" if text else "SLURM_JOB_END_TIME is not set"
    )
    show_line(
        f"warning: the end of this Slurm job is not known: {found}, and squeue does not tell it. The run stops before it on a "
        "signal only"
    )
    return math.inf


def ask_job_end(job: str) -> float | None:
    """Ask Slurm for the end of a job, in seconds since 1970, infinity without a limit; None if it does not answer."""
    if not job or shutil.which("squeue") is None:
        return None
    # All tasks of an array are listed, with a number of their own each (%A).
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%A|%e"]
    try:
        result = subprocess.run(
            ["env", "TZ=UTC0", "SLURM_TIME_FORMAT=standard", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SQUEUE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    ends = {
        number.strip(): end.strip() for number, _, end in (line.partition("|") for line in result.stdout.splitlines())
    }
    if ends.get(job) == NO_END:
        return math.inf
    try:
        return datetime.fromisoformat(f"{ends.get(job)}+00:00").timestamp()
    except ValueError:
        return None
