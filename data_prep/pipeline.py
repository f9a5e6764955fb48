"""The prep job, stage by stage: scan, duplicates, tokenizer, encode, publish.

A stage is a list of steps that leave files in the working directory `.NAME.prep` next to `out`. A run that was killed
continues from these files when it is started again; the result is always the same bytes. The directory `out` appears under
its name when everything in it is complete.
"""

import contextlib
import operator
import time
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig, check_prep
from data_prep.jobs.step_runner import StepRunner, open_step_runner
from data_prep.jobs.steps import Step
from data_prep.jobs.working_directory import (
    Job,
    WorkingDirectory,
    install_directory,
    open_working_directory,
    remove_temporary_files,
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
from megatron_rdt.errors import DataError
from megatron_rdt.locks import check_locks
from megatron_rdt.output_paths import resolve_output_directory

MEGA = 1e6


def prepare(config: PrepConfig) -> Path:
    """Prepare `config.sources` into `config.out`; return that directory.

    Nothing is done if the corpus exists already and was made with the same options from the same files.

    Raises:
        ConfigError: an option is wrong, or `out` holds something else.
        DataError: the text cannot be prepared; the message names file and line.
        LaunchError: another process is writing the same corpus, or no scheduler answers.
    """
    check_prep(config)
    out = resolve_output_directory(config.out)
    with publish.lock_output(out):
        publish.recover_interrupted_publish(out)
        if publish.is_already_prepared(out, config, replace=config.restart):
            print(f"{out} is complete and was made with these options from these files: nothing to do")
            return out
        root = working_directory_path(out)
        publish.check_output(out)
        began = time.monotonic()
        with open_step_runner(config, root) as runner:
            work = open_working_directory(config, root, lambda inputs: _check_inputs(out, config, inputs))
            with publish.explain_failure(out):
                _print_plan(work)
                remove_temporary_files(root)
                # Workers have files in the working directory, which both success and failure may remove: they end first.
                with contextlib.closing(runner):
                    groups = _run_stages_before_encoding(work, runner)
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


def _run_stages_before_encoding(work: WorkingDirectory, runner: StepRunner) -> list[PartGroup]:
    """Run scan, duplicates and tokenizer, and raise if their results rule a corpus out; return all groups of parts."""
    job, parts = work.job, work.parts
    if job.config.max_documents:
        # The first documents are known only when the parts before them are read, so this is one step.
        size = sum(part.size for part in parts)
        scan = [Step("scan-first", job.path("scan", "first.json"), scan_first_documents, (parts,), size)]
    else:
        scan = [Step(f"scan-{part.name}", scan_record_path(job, part), scan_part, (part,), part.size) for part in parts]
    for number, files in enumerate(group_files_to_hash(work.inputs)):
        name = f"run-{number:05d}"
        scan.append(Step(f"hash-{name}", job.path("inputs", f"{name}.json"), hash_inputs, (name, files)))
    runner.run_stage(job, "scan", scan)
    found = check_scan(work)
    check_files_differ(work)
    if job.config.dedup != "none":
        step = Step("duplicates", job.path("duplicates.json"), write_duplicates, (parts,))
        runner.run_stage(job, "duplicates", [step])
        dropped = (job.read_record(step.record) or {"counts": {}})["counts"]
        documents = {"train": found["documents"] - found["valid"], "valid": found["valid"]}
        check_text_is_left(work, documents, sum(dropped.values()))
    sample = 0 if job.config.tokenizer else min(found["bytes"], job.config.tokenizer_sample_bytes)
    step = Step("tokenizer", tokenizer_record_path(job), make_tokenizer, (parts,), sample)
    runner.run_stage(job, "tokenizer", [step])
    itemsize = token_dtype(Tokenizer(job.corpus / "tokenizer").vocab_size).itemsize
    return group_parts(parts, read_text_bytes(job, parts), job.config.shard_bytes, itemsize)


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
    runner.run_stage(job, "encode", steps)


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
    check_locks()
    document = write_manifest(work, records, duplicates)
    check_locks()
    publish.publish_corpus(out)
    print_summary(document)
    return document
