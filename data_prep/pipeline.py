"""The prep job, stage by stage: scan, duplicates, tokenizer, encode, publish.

A stage is a list of steps that leave files in the working directory `.NAME.prep` next to `out`. A run that was killed
continues from these files when it is started again, and several array tasks share the steps; the result is always the
same bytes. The directory `out` appears under its name when everything in it is complete.
"""

import contextlib
import operator
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig, check_prep, parse_array_task
from data_prep.jobs.leases import hold_leases
from data_prep.jobs.step_runner import Step, StepRunner
from data_prep.jobs.workers import open_worker_pool
from data_prep.jobs.working_directory import (
    Job,
    WorkingDirectory,
    install_directory,
    open_working_directory,
    remove_temporary_files,
    resume_working_directory,
    working_directory_path,
)
from data_prep.sources.inputs import Input, Part, describe_changed_input, describe_unread, list_input_files
from data_prep.stages import publish
from data_prep.stages.duplicates import find_duplicates
from data_prep.stages.encode import encode_slice, spill_path
from data_prep.stages.encode_examples import check_marks_examples
from data_prep.stages.repeated_text import check_files_differ, check_text_is_left
from data_prep.stages.scan import hash_inputs, scan_first_documents, scan_part, scan_record_path, scan_rows_path
from data_prep.stages.scan_totals import check_scan, count_lines_before, list_tasks
from data_prep.stages.tokenizer.make_tokenizer import make_tokenizer, tokenizer_record_path
from data_prep.stages.tokenizer.train_sentencepiece import check_special_tokens
from data_prep.stages.tokenizer.write_tokenizer import check_has_eos
from data_prep.stages.write_manifest import group_files_to_hash, print_summary, write_manifest
from data_prep.stages.write_shards import (
    PartGroup,
    group_parts,
    group_record_path,
    read_text_bytes,
    remove_spills,
    write_group,
)
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError, DataError, RdtError
from megatron_rdt.files import write_text
from megatron_rdt.locks import hold_lock
from megatron_rdt.output_paths import resolve_output_directory

ARRAY_SIZE = "tasks"  # file with the number of array tasks, as the latest one was started with
NAMED_GROUPS = 8  # missing groups that a message names
MEGA = 1e6


def prepare(config: PrepConfig, command: str = "rdt prep") -> Path:
    """Prepare `config.sources` into `config.out`, or this array task's share of it; return that directory.

    Nothing is done if the corpus exists already and was made with the same options from the same files.

    Args:
        config: the options.
        command: the command line without --shard, for messages.

    Raises:
        ConfigError: an option is wrong, or `out` holds something else.
        DataError: the text cannot be prepared; the message names file and line.
        LaunchError: another process is writing the same corpus.
    """
    check_prep(config)
    out, array_task = resolve_output_directory(config.out), parse_array_task(config)
    if array_task is not None:
        _prepare_share(out, config, array_task, command)
        return out
    with publish.lock_output(out):
        publish.recover_interrupted_publish(out)
        if publish.is_already_prepared(out, config, replace=config.restart):
            _print_nothing_to_do(out)
            return out
        publish.check_no_array_task(out)
        root = working_directory_path(out)
        publish.check_output(out)
        began = time.monotonic()
        work = open_working_directory(config, root, lambda: None, lambda inputs: _check_inputs(out, config, inputs))
        with publish.explain_failure(out, alone=True):
            _print_plan(work)
            remove_temporary_files(root)
            with open_worker_pool(config.workers) as pool:
                runner = StepRunner(work.job, pool, None)
                groups = _run_stages_before_encoding(work, runner, 0, 1)
                _encode_groups(work, runner, groups)
            document = _write_manifest_and_publish(work, out, groups)
            _print_speed(document, time.monotonic() - began)
    return out


def _check_inputs(out: Path, config: PrepConfig, inputs: list[Input]) -> None:
    """Raise ConfigError or DataError if the tokenizer, the number of files or the free space rules the job out.

    Raises:
        ConfigError: an option does not fit the input.
        DataError: the disk has no room, or the tokenizer is missing or damaged.
    """
    if config.tokenizer:
        tokenizer = Tokenizer(config.tokenizer)
        check_has_eos(tokenizer)
        if config.task_field:
            check_marks_examples(tokenizer)
    else:
        check_special_tokens(config.special_tokens)
    publish.check_file_counts(config, inputs)
    publish.check_disk_space(out, config, inputs)


def _print_nothing_to_do(out: Path) -> None:
    """Print that the corpus exists already."""
    print(f"{out} is complete and was made with these options from these files: nothing to do")


def _print_plan(work: WorkingDirectory) -> None:
    """Print the tokenizer that is used, and what of the sources is not read: before the work, so that it can be stopped."""
    config = work.job.config
    if config.tokenizer:
        print(f"tokenizer: {config.tokenizer}, {Tokenizer(config.tokenizer).vocab_size:,} pieces")
    else:
        special = f", special tokens {' '.join(config.special_tokens)}" if config.special_tokens else ""
        print(f"tokenizer: trained on these documents, {config.tokenizer_type}, {config.vocab_size:,} pieces{special}")
    for line in describe_unread(work.listing.as_json()):
        print(line, flush=True)


def _print_speed(document: dict[str, Any], seconds: float) -> None:
    """Print the amount of text in a manifest and the speed at which it was prepared."""
    size = sum(split["text_bytes"] for split in document["splits"].values())
    print(f"{size / MEGA:,.1f} MB of text in {seconds:,.1f} s, {size / MEGA / max(seconds, 1e-3):,.1f} MB/s")


def _prepare_share(out: Path, config: PrepConfig, array_task: tuple[int, int], command: str) -> None:
    """Help with the stages before the encoding, then write the groups of one array task; print what is left.

    Args:
        out: directory of the corpus.
        config: the options.
        array_task: index of this task, and how many there are.
        command: the command line without --shard, for messages.
    """
    index, count = array_task
    root = working_directory_path(out)
    with contextlib.ExitStack() as stack:
        # The lock of the corpus is held only while the working directory is opened, so that one task makes it. From then on
        # each task holds a lock with its own index.
        with publish.lock_output(out, publish.LOCK_PATIENCE_S):
            publish.recover_interrupted_publish(out)
            if _is_already_prepared_for_task(out, config):
                _print_nothing_to_do(out)
                return
            publish.check_output(out)
            message = f"array task {config.shard} is running on {out} already. Give each task another i in --shard i/N."
            # In a directory that exists, take the own lock first: opening it may remove it, and must not while a process
            # with the same index uses it. That removal takes the lock file with it, which is then made anew.
            if root.exists():
                stack.enter_context(hold_lock(publish.array_task_lock_path(root, index), message))
            work = open_working_directory(
                config,
                root,
                lambda: publish.check_no_array_task(out, index),
                lambda inputs: _check_inputs(out, config, inputs),
            )
            _print_plan(work)
            if not (root / "locks" / str(index)).exists():
                stack.enter_context(hold_lock(publish.array_task_lock_path(root, index), message))
            write_text(root / ARRAY_SIZE, f"{count}\n")
        stack.enter_context(publish.explain_failure(out, alone=False))
        pool = stack.enter_context(open_worker_pool(config.workers))
        leases = stack.enter_context(hold_leases(root / "leases", f"task-{index}"))
        runner = StepRunner(work.job, pool, leases)
        groups = _run_stages_before_encoding(work, runner, index, count)
        _encode_groups(work, runner, [group for group in groups if group.index % count == index])
    left = [group for group in groups if not work.job.is_done(group_record_path(work.job, group))]
    _print_share_done(config.shard, len(left), len(groups), command)


def _print_share_done(shard: str, left: int, groups: int, command: str) -> None:
    """Print that an array task is done, what is left to others, and the command that finishes the corpus.

    Args:
        shard: the option --shard.
        left: number of groups that are not written yet.
        groups: number of all groups.
        command: the command line without --shard.
    """
    if left:
        print(
            f"array task {shard} is done; {left:,} of {groups:,} groups of documents are still to be written by the other "
            f"array tasks. When they are done: {_format_merge_command(command)}"
        )
    else:
        print(
            f"array task {shard} is done, and all groups of documents are written. Finish the corpus with: "
            f"{_format_merge_command(command)}"
        )


def _is_already_prepared_for_task(out: Path, config: PrepConfig) -> bool:
    """Return True if `out` is complete, False if not, or if --restart is to replace a damaged or other corpus.

    Other array tasks of the same restart may have finished and published the corpus: it must not be made again.
    """
    try:
        return publish.is_already_prepared(out, config, replace=False)
    except RdtError:
        if not config.restart:
            raise
        return publish.is_already_prepared(out, config, replace=True)


def _format_merge_command(command: str) -> str:
    """Command line of `rdt prep merge` with the same options."""
    return command.replace("rdt prep", "rdt prep merge", 1)


def _run_stages_before_encoding(work: WorkingDirectory, runner: StepRunner, index: int, count: int) -> list[PartGroup]:
    """Run scan, duplicates and tokenizer, and raise if their results rule a corpus out; return all groups of parts.

    Args:
        work: the working directory.
        runner: runs the steps.
        index, count: of this array task. It begins with the parts whose number modulo `count` is its index, so that the
            tasks rarely ask for the lease of the same step.
    """
    job, parts = work.job, work.parts
    if job.config.max_documents:
        # The first documents are known only when the parts before them are read, so this is one step.
        size = sum(part.size for part in parts)
        scan = [Step("scan-first", job.path("scan", "first.json"), scan_first_documents, (parts,), size)]
    else:
        own_first = sorted(parts, key=lambda part: (part.index % count != index, part.index))
        scan = [
            Step(f"scan-{part.name}", scan_record_path(job, part), scan_part, (part,), part.size) for part in own_first
        ]
    for number, files in enumerate(group_files_to_hash(work.inputs)):
        name = f"run-{number:05d}"
        scan.append(Step(f"hash-{name}", job.path("inputs", f"{name}.json"), hash_inputs, (name, files)))
    runner.run_stage("scan", scan)
    found = check_scan(work)
    check_files_differ(work)
    if job.config.dedup != "none":
        step = Step("duplicates", job.path("duplicates.json"), write_duplicates, (parts,))
        runner.run_stage("duplicates", [step])
        dropped = (job.read_record(step.record) or {"counts": {}})["counts"]
        documents = {"train": found["documents"] - found["valid"], "valid": found["valid"]}
        check_text_is_left(work, documents, sum(dropped.values()))
    sample = 0 if job.config.tokenizer else min(found["bytes"], job.config.tokenizer_sample_bytes)
    step = Step("tokenizer", tokenizer_record_path(job), make_tokenizer, (parts,), sample)
    runner.run_stage("tokenizer", [step])
    return _group_scanned_parts(work)


def _group_scanned_parts(work: WorkingDirectory) -> list[PartGroup]:
    """Return the groups of all parts, by the text that their scans found and the size of a token."""
    itemsize = token_dtype(Tokenizer(work.job.corpus / "tokenizer").vocab_size).itemsize
    text_bytes = read_text_bytes(work.job, work.parts)
    return group_parts(work.parts, text_bytes, work.job.config.shard_bytes, itemsize)


def write_duplicates(job: Job, parts: list[Part]) -> None:
    """Write the numbers of each part's rows that are duplicates, and a record with how many there are."""
    directory = job.temporary_directory("duplicates")
    scans = [scan_rows_path(job, part) for part in parts]
    counts = find_duplicates(scans, directory, bands=job.config.dedup == "near")
    install_directory(directory, job.root / "duplicates")
    job.write_record(job.path("duplicates.json"), [], {"counts": counts})


def _encode_groups(work: WorkingDirectory, runner: StepRunner, groups: list[PartGroup]) -> None:
    """Encode the parts of groups in slices, and write the shards of each group when its slices are done."""
    job = work.job
    vocab_size = Tokenizer(job.corpus / "tokenizer").vocab_size
    lines_before, tasks = count_lines_before(work), list_tasks(work)
    text_bytes = read_text_bytes(job, work.parts)
    steps: list[Step] = []
    for group in groups:
        if job.is_done(group_record_path(job, group)):
            remove_spills(job, group)  # left by a process that was killed between the record and the removal
            continue
        slices = [
            Step(
                f"encode-{part.name}-{i:02d}",
                spill_path(job, part, i, ".json"),
                encode_slice,
                (part, i, count, lines_before[part.index], tasks),
                text_bytes[part.index] // count,
            )
            for part, count in zip(group.parts, group.slices)
            for i in range(count)
        ]
        # All slices of a group come right before its shards, so that the encoded slices of few groups are on disk at once.
        needs = frozenset(step.name for step in slices)
        record = group_record_path(job, group)
        steps += [*slices, Step(f"write-{group.name}", record, write_group, (group, vocab_size), needs=needs)]
    runner.run_stage("encode", steps)


def _write_manifest_and_publish(work: WorkingDirectory, out: Path, groups: list[PartGroup]) -> dict[str, Any]:
    """Write the manifest, publish the corpus, print its summary; return the manifest. DataError if text changed."""
    job = work.job
    if changed := describe_changed_input(
        {file.name: file for file in work.inputs}, list_input_files(job.config), operator.ne
    ):
        raise DataError(
            f"the text changed while it was prepared: {changed}. When nothing writes to it any more, run `rdt prep` again."
        )
    records = [record for group in groups if (record := job.read_record(group_record_path(job, group))) is not None]
    duplicates = (job.read_record(job.path("duplicates.json")) or {"counts": {}})["counts"]
    document = write_manifest(work, records, duplicates)
    publish.publish_corpus(out)
    print_summary(document)
    return document


def merge(config: PrepConfig, command: str = "rdt prep") -> Path:
    """Publish what the array tasks of `rdt prep --shard i/N` wrote as one corpus, copying no token; return `out`.

    Args:
        config: the options that the tasks had.
        command: the command line that makes the corpus, without --shard, for messages.

    Raises:
        ConfigError: there is nothing to merge, or it was made with other options.
        DataError: groups are missing; the message says how to make them.
        LaunchError: an array task is running.
    """
    check_prep(config)
    out = resolve_output_directory(config.out)
    with publish.lock_output(out, publish.LOCK_PATIENCE_S):
        publish.recover_interrupted_publish(out)
        root = working_directory_path(out)
        is_unfinished = root.exists()
        if publish.is_already_prepared(out, config, replace=config.restart and is_unfinished):
            _print_nothing_to_do(out)
            return out
        publish.check_no_array_task(out)
        publish.check_output(out)
        work, changed = resume_working_directory(config, root, lambda: None, lambda inputs: None)
        if work is None:
            reason = f"{changed} since the array tasks ran" if changed else f"there is no unfinished prep of {out}"
            raise ConfigError(f"{reason}. Run the array tasks first: {command} --shard i/N")
        groups = _require_all_groups(work, command)
        with publish.explain_failure(out, alone=False):
            _write_manifest_and_publish(work, out, groups)
    return out


def _require_all_groups(work: WorkingDirectory, command: str) -> list[PartGroup]:
    """Remove temporary files and return all groups; DataError if one, or a step before them, is not done."""
    job = work.job
    count = _read_array_size(job.root)
    unscanned = [part for part in work.parts if not job.is_done(scan_record_path(job, part))]
    before = [tokenizer_record_path(job)] + ([job.path("duplicates.json")] if job.config.dedup != "none" else [])
    if unscanned or not all(map(job.is_done, before)):
        missing = f"the scan of {len(unscanned)} of {len(work.parts)} parts" if unscanned else "the tokenizer"
        raise DataError(f"{missing} is missing. Make it with:\n{_format_task_commands(command, range(count), count)}")
    groups = _group_scanned_parts(work)
    unwritten = [group for group in groups if not job.is_done(group_record_path(job, group))]
    if unwritten:
        names = ", ".join(group.name for group in unwritten[:NAMED_GROUPS])
        more = ", ..." if len(unwritten) > NAMED_GROUPS else ""
        indices = sorted({group.index % count for group in unwritten})
        raise DataError(
            f"{names}{more} of {len(groups)} groups are missing. Make them with:\n"
            f"{_format_task_commands(command, indices, count)}"
        )
    remove_temporary_files(job.root)
    return groups


def _read_array_size(root: Path) -> int:
    """Read the number of array tasks that a working directory was last used with; 1 if it has none."""
    try:
        return int((root / ARRAY_SIZE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 1


def _format_task_commands(command: str, indices: Iterable[int], count: int) -> str:
    """Command lines of array tasks, and of a plain prep that does the work of all."""
    lines = [f"  {command} --shard {i}/{count}" for i in indices]
    return "\n".join([*lines, f"or all on this machine: {command}"])
