"""The prep job, stage by stage: scan, duplicates, tokenizer, encode, publish.

Every stage is a list of steps that leave files in the working directory `.NAME.prep` beside `out`. Whoever is killed is
started again and goes on; several tasks share the steps; the result is the same bytes. The directory `out` appears under
its name when everything in it is complete.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig, check_prep, task_of
from data_prep.jobs.leases import claims
from data_prep.jobs.step_runner import Step, Steps
from data_prep.jobs.workers import pool
from data_prep.jobs.working_directory import Job, Plan, open_plan, remove_temporary, resume
from data_prep.sources.inputs import Part, input_files
from data_prep.stages import publish
from data_prep.stages.duplicates import find_duplicates
from data_prep.stages.encode import encode_slice, spill_path
from data_prep.stages.scan import hash_inputs, scan_first, scan_part, scan_path, scan_record
from data_prep.stages.scan_totals import check_scan, count_lines_before
from data_prep.stages.tokenizer.make_tokenizer import make_tokenizer, take_name, tokenizer_record
from data_prep.stages.write_manifest import group_files_to_hash, print_summary, write_manifest
from data_prep.stages.write_shards import Group, group_record, make_groups, remove_spills, text_bytes, write_group
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError, DataError, RdtError
from megatron_rdt.files import TEMPORARY_SUFFIX, hold_lock, write_text

TASKS = "tasks"  # file with the number of tasks that the last one was told
NAMED = 8  # missing groups that a message names
MEGA = 1e6


def prepare(config: PrepConfig, command: str = "rdt prep") -> Path:
    """Prepare `config.sources` into `config.out`, or this task's share of it; returns that directory.

    Nothing is done when it is there already.

    Args:
        config: the options.
        command: what was typed, without --shard, for messages.

    Raises:
        ConfigError: an option is wrong, or something else is there.
        DataError: the text cannot be prepared; the message names file and line.
        LaunchError: another process is at it.
    """
    check_prep(config)
    out, task = Path(config.out), task_of(config)
    if task is not None:
        _prepare_share(out, config, task, command)
        return out
    with publish.lock(out):
        publish.mend(out)
        if publish.already_there(out, config, replace=config.restart):
            print(f"{out} is complete and was made with these options from these files: nothing to do")
            return out
        publish.check_alone(out)
        root = publish.working_directory(out)
        with publish.explained(out, alone=True):
            began = time.monotonic()
            plan = open_plan(config, root, lambda: None)
            publish.check_space(out, config, plan.inputs)
            remove_temporary(root)
            with pool(config.workers) as workers:
                steps = Steps(plan.job, workers, None)
                groups = _until_groups(plan, steps, 0, 1)
                _write_groups(plan, steps, groups)
            document = _finish(plan, out, groups)
            _print_speed(document, time.monotonic() - began)
    return out


def _print_speed(document: dict[str, Any], seconds: float) -> None:
    size = sum(split["text_bytes"] for split in document["splits"].values())
    print(f"{size / MEGA:,.1f} MB of text in {seconds:,.1f} s, {size / MEGA / max(seconds, 1e-3):,.1f} MB/s")


def _prepare_share(out: Path, config: PrepConfig, task: tuple[int, int], command: str) -> None:
    """Do what is this task's, and what of the scan no other task has begun."""
    index, count = task
    root = publish.working_directory(out)
    with contextlib.ExitStack() as stack:
        with publish.lock(out, publish.LOCK_PATIENCE_S):
            publish.mend(out)
            if _is_complete(out, config):
                print(f"{out} is complete and was made with these options from these files: nothing to do")
                return
            message = f"task {config.shard} is at work on {out} already. Give each task another i in --shard i/N."
            if root.exists():
                stack.enter_context(hold_lock(publish.task_lock(root, index), message))
            plan = open_plan(config, root, lambda: publish.check_alone(out, index))
            publish.check_space(out, config, plan.inputs)
            if not (root / "locks" / str(index)).exists():
                stack.enter_context(hold_lock(publish.task_lock(root, index), message))
            write_text(root / TASKS, f"{count}\n")
        stack.enter_context(publish.explained(out, alone=False))
        workers = stack.enter_context(pool(config.workers))
        held = stack.enter_context(claims(root / "claims", f"task-{index}"))
        steps = Steps(plan.job, workers, held)
        groups = _until_groups(plan, steps, index, count)
        _write_groups(plan, steps, [group for group in groups if group.index % count == index])
    left = [group for group in groups if plan.job.record(group_record(plan.job, group)) is None]
    print(f"task {index} of {count}: its groups are written, {len(left)} of {len(groups)} are left to others")
    print(f"when all tasks are done: {_merge_command(command)}")


def _is_complete(out: Path, config: PrepConfig) -> bool:
    """As already_there; a task replaces with --restart only what is damaged or differs: others may have finished."""
    try:
        return publish.already_there(out, config, replace=False)
    except RdtError:
        if not config.restart:
            raise
        return publish.already_there(out, config, replace=True)


def _merge_command(command: str) -> str:
    return command.replace("rdt prep", "rdt prep merge", 1)


def _own_first(parts: list[Part], index: int, count: int) -> list[Part]:
    return sorted(parts, key=lambda part: (part.index % count != index, part.index))


def _until_groups(plan: Plan, steps: Steps, index: int, count: int) -> list[Group]:
    """Everything before the encoding; the groups that are to be encoded."""
    job, parts = plan.job, plan.parts
    if job.config.max_documents:
        size = sum(part.size for part in parts)
        scan = [Step("scan-first", job.path("scan", "first.json"), scan_first, (parts,), size)]
    else:
        scan = [
            Step(f"scan-{part.name}", scan_record(job, part), scan_part, (part,), part.size)
            for part in _own_first(parts, index, count)
        ]
    for number, run in enumerate(group_files_to_hash(plan.inputs)):
        name = f"run-{number:05d}"
        scan.append(Step(f"hash-{name}", job.path("inputs", f"{name}.json"), hash_inputs, (name, run)))
    steps.run("scan", scan)
    found = check_scan(plan)
    if job.config.dedup != "none":
        steps.run("duplicates", [Step("duplicates", job.path("duplicates.json"), remove_duplicates, (parts,))])
    sample = 0 if job.config.tokenizer else min(found["bytes"], job.config.tokenizer_sample_bytes)
    steps.run("tokenizer", [Step("tokenizer", tokenizer_record(job), make_tokenizer, (parts,), sample)])
    return _groups(plan)


def _groups(plan: Plan) -> list[Group]:
    itemsize = token_dtype(Tokenizer(plan.job.corpus / "tokenizer").vocab_size).itemsize
    return make_groups(plan.parts, text_bytes(plan.job, plan.parts), plan.job.config.shard_bytes, itemsize)


def remove_duplicates(job: Job, parts: list[Part]) -> None:
    """Write which rows of each part are duplicates, and how many there are."""
    # Several tasks may get here at the same time; the first to finish gives its directory the name.
    directory = job.path(f"duplicates-{os.uname().nodename}-{os.getpid()}{TEMPORARY_SUFFIX}")
    scans = [scan_path(job, part) for part in parts]
    counts = find_duplicates(scans, directory, bands=job.config.dedup == "near")
    take_name(directory, job.root / "duplicates")
    job.write_record(job.path("duplicates.json"), [], {"counts": counts})


def _write_groups(plan: Plan, steps: Steps, groups: list[Group]) -> None:
    job = plan.job
    vocab_size = Tokenizer(job.corpus / "tokenizer").vocab_size
    before = dict(zip((part.index for part in plan.parts), count_lines_before(plan)))
    sizes = dict(zip((part.index for part in plan.parts), text_bytes(job, plan.parts)))
    todo: list[Step] = []
    for group in groups:
        if job.record(group_record(job, group)) is not None:
            remove_spills(job, group)  # of one that was killed there
            continue
        slices = [
            Step(
                f"encode-{part.name}-{i:02d}",
                spill_path(job, part, i, ".json"),
                encode_slice,
                (part, i, count, before[part.index]),
                sizes[part.index] // count,
            )
            for part, count in zip(group.parts, group.slices)
            for i in range(count)
        ]
        needs = frozenset(step.name for step in slices)
        write = Step(f"write-{group.name}", group_record(job, group), write_group, (group, vocab_size), needs=needs)
        todo += [*slices, write]
    steps.run("encode", todo)


def _finish(plan: Plan, out: Path, groups: list[Group]) -> dict[str, Any]:
    """Write the manifest over all groups and publish; the manifest."""
    job = plan.job
    if input_files(job.config) != plan.inputs:
        raise DataError("the text changed while it was prepared. Run `rdt prep` again: it begins again where it must.")
    records = [record for group in groups if (record := job.record(group_record(job, group))) is not None]
    duplicates = (job.record(job.path("duplicates.json")) or {"counts": {}})["counts"]
    document = write_manifest(plan, records, duplicates)
    publish.publish(out)
    print_summary(document)
    return document


def merge(config: PrepConfig, command: str = "rdt prep") -> Path:
    """Make one corpus of what the tasks of `rdt prep --shard i/N` wrote, without copying a token; returns it.

    Args:
        config: the options that the tasks had.
        command: what makes the corpus, without --shard, for messages.

    Raises:
        ConfigError: there is nothing to merge, or it was made with other options.
        DataError: groups are missing; the message says how to make them.
        LaunchError: a task is at work.
    """
    check_prep(config)
    out = Path(config.out)
    with publish.lock(out, publish.LOCK_PATIENCE_S):
        publish.mend(out)
        root = publish.working_directory(out)
        unfinished = root.exists()
        if publish.already_there(out, config, replace=config.restart and unfinished):
            print(f"{out} is complete and was made with these options from these files: nothing to do")
            return out
        publish.check_alone(out)
        plan = resume(config, root, lambda: None)
        if not isinstance(plan, Plan):
            why = f"{plan} since the tasks ran" if plan else f"there is no unfinished prep of {out}"
            raise ConfigError(f"{why}. Run the tasks first: {command} --shard i/N")
        with publish.explained(out, alone=False):
            _finish(plan, out, _all_groups(plan, command))
    return out


def _all_groups(plan: Plan, command: str) -> list[Group]:
    """All groups; DataError where one is not written, or a step before it is not done."""
    job = plan.job
    tasks = _task_count(job.root)
    scans = [part for part in plan.parts if job.record(scan_record(job, part)) is None]
    before = [tokenizer_record(job)] + ([job.path("duplicates.json")] if job.config.dedup != "none" else [])
    if scans or any(job.record(record) is None for record in before):
        what = f"the scan of {len(scans)} of {len(plan.parts)} parts" if scans else "the tokenizer"
        raise DataError(f"{what} is missing. Make what is missing with:\n{_commands(command, range(tasks), tasks)}")
    groups = _groups(plan)
    missing = [group for group in groups if job.record(group_record(job, group)) is None]
    if missing:
        names = ", ".join(group.name for group in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        numbers = sorted({group.index % tasks for group in missing})
        raise DataError(
            f"{names} of {len(groups)} groups are missing. Make them with:\n{_commands(command, numbers, tasks)}"
        )
    remove_temporary(job.root)
    return groups


def _task_count(root: Path) -> int:
    try:
        return int((root / TASKS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 1


def _commands(command: str, tasks: Any, count: int) -> str:
    return "\n".join([*(f"  {command} --shard {i}/{count}" for i in tasks), f"or all on this machine: {command}"])
