"""Sums over the scans of all parts, and the checks that decide whether a prep continues after its scan."""

from collections import Counter
from typing import Any

from data_prep.jobs.working_directory import WorkingDirectory
from data_prep.sources.records import BAD_LISTED, format_bad_record
from data_prep.stages.scan import scan_record_path
from megatron_rdt.errors import DataError

# Fields of a part's record.
SUMMED = ["documents", "valid", "bytes", "records", "changed", "prompted", "replaced", "bad_count"]
SUMMED += ["input_bytes", "damaged_bytes"]
MOST_TASKS = 2**16


class EmptySplitError(DataError):
    """A split that is wanted has no documents: the scan is of no use, and nothing of it is kept."""


def count_lines_before(work: WorkingDirectory) -> list[int]:
    """Count, for each part, the lines of its file in the parts before it."""
    found, path, lines = [], "", 0
    for part in work.parts:
        if part.inputs[0].path != path:
            path, lines = part.inputs[0].path, 0
        found.append(lines)
        record = work.job.read_record(scan_record_path(work.job, part))
        lines += record["lines"] if record else 0
    return found


def sum_scans(work: WorkingDirectory) -> dict[str, Any]:
    """Sum the records of all scans: the numbers of SUMMED, `dropped` by reason, and the first bad records in words.

    `damaged_records` is the number of records from damaged files, those before the damage included.
    """
    sums: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    bad: list[str] = []
    for part, before in zip(work.parts, count_lines_before(work)):
        record = work.job.read_record(scan_record_path(work.job, part)) or {"dropped": {}, "bad": []}
        dropped.update(record["dropped"])
        for name in SUMMED:
            sums[name] += record.get(name, 0)
        if record.get("damaged_bytes"):
            sums["damaged_records"] += record["records"]
        for path, line, message in record["bad"][: BAD_LISTED - len(bad)]:
            bad.append(format_bad_record(path, line and line + before, message))
    return {**sums, "dropped": dropped, "bad": bad}


def list_tasks(work: WorkingDirectory) -> list[str]:
    """Return the names of all tasks that examples have, sorted: a task's number in the shards is its index."""
    records = (work.job.read_record(scan_record_path(work.job, part)) for part in work.parts)
    tasks = sorted({task for record in records if record is not None for task in record.get("tasks", ())})
    if len(tasks) > MOST_TASKS:
        raise DataError(
            f"the examples name {len(tasks):,} tasks, at most {MOST_TASKS:,} have numbers. Set --task_field."
        )
    return tasks


def check_scan(work: WorkingDirectory) -> dict[str, Any]:
    """Return the sums of all scans; raise DataError or EmptySplitError if the prep cannot continue with them.

    Raises:
        DataError: too many records are bad.
        EmptySplitError: there is no document, or none for a split that is wanted, or none with a prompt where there should be.
    """
    config, found = work.job.config, sum_scans(work)
    if reason := _describe_excess(found, config.max_bad):
        first = "\n  ".join(found["bad"][:3])
        raise DataError(
            f"{reason}, more than --max_bad {config.max_bad:g}; the first:\n  {first}\nFix the input, or raise --max_bad."
        )
    if not found["documents"]:
        raise EmptySplitError(f"no document with text in {config.sources}. Check the sources and --text_field.")
    if config.prompt_field and not found["prompted"]:
        raise EmptySplitError(
            f'none of {found["documents"]:,} documents has a prompt in the field "{config.prompt_field}". Check --prompt_field.'
        )
    check_splits(work, {"train": found["documents"] - found["valid"], "valid": found["valid"]})
    return found


def _describe_excess(found: dict[str, Any], max_bad: float) -> str:
    """Return the number of bad records, or of bytes that are lost, if it is more than `max_bad` allows; "" otherwise."""
    if found["bad_count"] > max(BAD_LISTED, max_bad * found["records"]):
        return f"{found['bad_count']:,} of {found['records']:,} records are bad"
    size, damaged = found["input_bytes"], found["damaged_bytes"]
    if damaged <= max_bad * size:
        return ""
    # The damaged files lost about as many records as whole files of their size have.
    records = found["records"] - found["damaged_records"]
    lost = round(damaged * records / max(size - damaged, 1))
    if records and lost <= BAD_LISTED:
        return ""
    about = f", about {lost:,} records," if records else ""
    return f"{damaged:,} of {size:,} bytes of input{about} are zero or in files that cannot be read to their end"


def check_splits(work: WorkingDirectory, documents: dict[str, int]) -> None:
    """Raise EmptySplitError if the training split, or a validation split that the options ask for, is empty."""
    config = work.job.config
    wants_valid = config.valid_fraction > 0 or bool(config.valid_sources)
    for split, count in documents.items():
        if not count and (split == "train" or wants_valid):
            raise EmptySplitError(
                f"the {split} split would be empty with {sum(documents.values())} documents. Add documents or change "
                "--valid_fraction."
            )
