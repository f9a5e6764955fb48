"""State of a run from its files: who holds it, how far it is, how its last start ended, what it would resume from.

Nothing is guessed: a state follows from the lock, the records and the checkpoints, or is "unknown" with the reason. Files that
grow are read at their end, and no checkpoint's content is read.
"""

import json
import logging
import os
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.job_snapshot import SUBMITTED
from launch.slurm_queue import QueuedJob
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.config.load import SAVED_CONFIG
from megatron_rdt.config.yaml_files import UniqueKeys
from megatron_rdt.errors import CheckpointError
from megatron_rdt.run_directory import CHECKPOINTS, FAILURE, HANG, JOBS, LATEST, LOCK
from megatron_rdt.untrusted_files import parse_json

METRICS, RESTARTS = "metrics.jsonl", "restarts"
RUN_FILES = (SAVED_CONFIG, METRICS, LATEST, CHECKPOINTS, LOCK, JOBS, FAILURE)
MOST_LEVELS = 3  # of folders between the root and a run: those of a comparison are two below it
TAIL_BYTES = 1 << 16
RECENT_STEPS = 20  # whose median is the throughput
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "SPECIAL_EXIT")
STARTING = ("CONFIGURING", "RUNNING")
CHECKPOINT_LOGGER = logging.getLogger("megatron_rdt.checkpoint")


@dataclass
class RunStatus:
    """Everything that `rdt status` says of one run; None where its files do not say it.

    Attributes:
        state: running, hung, waiting (for Slurm), starting, finished, stopped (resumable), failed, new, damaged or unknown.
        reason: a clause on the state.
        step, steps: done, and of the whole run.
        tokens_per_second: median of the last recorded steps.
        eta_s: seconds that the steps which are left take at this rate, without evaluations and saves.
        record_age_s: seconds since the last record.
        checkpoint: name, step, health and age of the one that --resume auto takes.
        restarts: of its Slurm job in a row without a newer checkpoint.
        jobs: of Slurm, that are in the queue or run.
        notes: warnings, such as damaged checkpoints.
    """

    run: str
    state: str = "unknown"
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None
    record_age_s: float | None = None
    checkpoint: dict[str, Any] | None = None
    restarts: int = 0
    jobs: list[QueuedJob] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_run(path: Path) -> bool:
    """Return True if a directory holds files of a run."""
    return any(os.path.lexists(path / name) for name in RUN_FILES)


def list_runs(root: Path, levels: int = MOST_LEVELS) -> Iterator[Path]:
    """Yield the run directories below `root` in the order of their names, those of comparisons included."""
    for path in sorted(root.iterdir()):
        if not path.is_dir() or path.name.startswith(".") or path.name == SUBMITTED:
            continue
        if not os.access(path, os.R_OK | os.X_OK) or is_run(path):
            yield path
        elif levels > 1:
            yield from list_runs(path, levels - 1)


def read_tail(path: Path) -> list[dict[str, Any]]:
    """Return the last records of a file of JSON lines, oldest first, without those that a kill cut short."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        lines = file.read().splitlines()[1 if size > TAIL_BYTES else 0 :]
    records = []
    for line in lines:
        try:
            record = parse_json(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_section(path: Path, name: str) -> dict[str, Any]:
    """Return one section of a YAML file without parsing the others, which would take most of the time.

    Raises:
        ValueError: there is no such section, or it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    found = re.search(rf"^{name}:.*\n?(?:(?:[ \t].*)?\n?)*", text, re.MULTILINE)
    try:
        content = yaml.load(found[0] if found else "", UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"its section {name} is no YAML") from error
    if not isinstance(content, dict) or not isinstance(content.get(name), dict):
        raise ValueError(f"it has no section {name}")
    return content[name]


@contextmanager
def _collect_warnings(notes: list[str]) -> Iterator[None]:
    """Append what the checkpoint package warns of to `notes`, instead of printing it."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    propagates, CHECKPOINT_LOGGER.propagate = CHECKPOINT_LOGGER.propagate, False
    CHECKPOINT_LOGGER.addHandler(handler)
    try:
        yield
    finally:
        CHECKPOINT_LOGGER.removeHandler(handler)
        CHECKPOINT_LOGGER.propagate = propagates


def _find_checkpoint(run: Path, notes: list[str]) -> dict[str, Any] | None:
    """Describe the checkpoint that --resume auto takes if every byte is as written; presence and sizes are compared."""
    from megatron_rdt.checkpoint import MANIFEST, find_own_problem, newest_checkpoint, read_manifest, verify

    try:
        with _collect_warnings(notes):
            chosen = newest_checkpoint(run, lambda directory: verify(directory, hashes=False))
    except CheckpointError as error:
        notes.append(str(error))
        return None
    if chosen is None:
        return None
    manifest = read_manifest(chosen)
    return {
        "name": chosen.name,
        "step": manifest["step"],
        "health": find_own_problem(manifest) or "healthy",
        "age_s": time.time() - (chosen / MANIFEST).stat().st_mtime,
    }


def _read_progress(status: RunStatus, run: Path) -> None:
    """Fill in steps, throughput and the time left from the config and the end of the records."""
    train: dict[str, Any] = {}
    try:
        if os.path.lexists(run / SAVED_CONFIG):
            train = read_section(run / SAVED_CONFIG, "train")
            status.steps = int(train["steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        status.notes.append(f"{run / SAVED_CONFIG} does not say the number of steps: {error}")
    if not (run / METRICS).is_file():
        return
    records = [record for record in read_tail(run / METRICS) if type(record.get("step")) is int]
    status.record_age_s = time.time() - (run / METRICS).stat().st_mtime
    if not records:
        if (run / METRICS).stat().st_size:
            status.notes.append(f"{run / METRICS} has no record at its end")
        return
    status.step = records[-1]["step"]
    rates = [record.get("tokens_per_second") for record in records[-RECENT_STEPS:]]
    known = [float(rate) for rate in rates if isinstance(rate, int | float) and rate > 0]
    status.tokens_per_second = statistics.median(known) if known else None
    if status.steps is None or not known:
        return
    try:
        batches = BatchSchedule.parse(train.get("batch_schedule", []), train["global_batch"])
        samples = batches.samples_after(status.steps) - batches.samples_after(status.step)
        status.eta_s = max(samples, 0) * train["sequence_length"] / statistics.median(known)
    except (ValueError, TypeError, KeyError) as error:
        status.notes.append(f"{run / SAVED_CONFIG} does not say the tokens of a step: {error!r}")


def _find_hang(run: Path) -> float | None:
    """Return for how many seconds ranks have waited, if they wrote so after the last record; None otherwise."""
    last_record = (run / METRICS).stat().st_mtime if (run / METRICS).exists() else 0.0
    reports = []
    for path in (run / HANG).glob("rank-*.json"):
        with suppress(FileNotFoundError):  # the next start deletes those of the one before
            reports.append((path.stat().st_mtime, path.read_text(encoding="utf-8")))
    written, text = max(reports, default=(0.0, ""))
    if written <= last_record:
        return None
    return time.time() - written + float(parse_json(text)["quiet_s"])


def _describe_failure(run: Path) -> str | None:
    """Return a clause on the error with which the last start ended, or on its death; None if it ended by itself."""
    if (run / FAILURE).is_file():
        try:
            record = parse_json((run / FAILURE).read_text(encoding="utf-8"))
            return ": ".join(str(record[key]) for key in ("error", "message") if record[key])
        except (ValueError, KeyError, TypeError) as error:
            return f"{FAILURE} is there and cannot be read ({error})"
    return "rank 0 was killed, or its node went down: its lock was left behind" if (run / LOCK).exists() else None


def _decide_state(status: RunStatus, run: Path, is_held: bool) -> tuple[str, str]:
    """Return the state of a run whose other facts are filled in, and a clause on it."""
    if is_held:
        quiet_s = _find_hang(run)
        if quiet_s is None:
            return "running", ""
        return "hung", f"no rank has begun or ended a collective for {quiet_s:.0f} s; see {run / HANG}"
    failure = _describe_failure(run)
    waiting = [job for job in status.jobs if job.state in WAITING]
    if waiting:
        return "waiting", "; ".join(filter(None, (f"Slurm: {waiting[0].reason}", failure and f"before: {failure}")))
    starting = [job for job in status.jobs if job.state in STARTING]
    if starting:
        return "starting", f"job {starting[0].job} is {starting[0].state}, and no process holds the run yet"
    saved = status.checkpoint["step"] if status.checkpoint else None
    if failure is not None:
        return "failed", failure
    if saved is not None and status.steps is not None and saved >= status.steps:
        return "finished", ""
    if saved is None and status.notes:
        return "damaged", "it has no good checkpoint, and files of it cannot be read"
    if saved is None and status.step is None:
        return "new", "no step has been recorded"
    if saved is not None and status.steps is None:
        return "unknown", "it may be finished: the number of its steps is not known"
    return "stopped", "--resume auto continues it" if saved is not None else "it has no checkpoint"


def read_status(
    run: Path, name: str, submitted: Sequence[str] | OSError, queued: Mapping[str, QueuedJob], is_held: bool
) -> RunStatus:
    """Return the status of a run; one that cannot be read is "damaged", with the reason.

    Args:
        run: its directory.
        name: to call it by.
        submitted: its jobs from `list_submitted_jobs`, or why they cannot be read.
        queued: jobs in Slurm's queue by their numbers.
        is_held: a living process holds its lock.
    """
    status = RunStatus(name)
    try:
        os.listdir(run)  # tells a folder that cannot be read from an empty one
        if (run / LOCK).exists() and not os.access(run / LOCK, os.R_OK):
            raise PermissionError(f"{run / LOCK} cannot be read, so nobody knows whether a process holds the run")
        status.checkpoint = _find_checkpoint(run, status.notes)
        _read_progress(status, run)  # afterwards, so that no record is older than the checkpoint
        if isinstance(submitted, OSError):
            raise submitted
        status.jobs = [queued[job] for job in submitted if job in queued]
        if (run / RESTARTS).is_file():
            words = (run / RESTARTS).read_text(encoding="utf-8").split()
            status.restarts = int(words[1]) if len(words) == 2 and words[1].isdecimal() else 0
        status.state, status.reason = _decide_state(status, run, is_held)
    except (OSError, ValueError, KeyError, TypeError) as error:
        status.state, status.reason = "damaged", " ".join(str(error).split())
    if status.state != "running":
        status.eta_s = None
    return status


def list_submitted_jobs(run: Path) -> list[str]:
    """Return the numbers of the Slurm jobs that were last submitted for a run, as `record_job` wrote them."""
    if not (run / JOBS).is_file():
        return []
    return [record["job"] for record in read_tail(run / JOBS) if isinstance(record.get("job"), str)]


def record_job(run: Path, job: str, script: str, output: str) -> None:
    """Append a submitted job to the record of its run."""
    run.mkdir(parents=True, exist_ok=True)
    record = {"job": job, "time": time.time(), "script": script, "output": output}
    with open(run / JOBS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
