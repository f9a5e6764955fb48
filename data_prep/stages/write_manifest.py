"""The manifest of a prepared corpus: what it was made from, with which options and versions, and what is in it."""

import json
import platform
from collections import Counter
from typing import Any

from data_prep.jobs.working_directory import (
    TOKENIZER_RECORD,
    WorkingDirectory,
    hash_code,
    hash_result_options,
    installed_versions,
    result_options,
)
from data_prep.sources.inputs import Input, describe_unread
from data_prep.stages.scan_totals import check_splits, list_tasks, sum_scans
from data_prep.stages.write_shards import SPLITS
from megatron_rdt.data.shard_files.corpus_manifest import FORMAT, MANIFEST, VERSION
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of, write_text

HASH_BYTES = 64_000_000  # one step hashes files of about this size together


def group_files_to_hash(inputs: list[Input]) -> list[list[Input]]:
    """Cut the files into runs of about HASH_BYTES, each hashed by one step."""
    runs: list[list[Input]] = []
    size = 0
    for file in inputs:
        if not runs or size + file.bytes > HASH_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(file)
        size += file.bytes
    return runs


def make_input_records(work: WorkingDirectory) -> list[dict[str, Any]]:
    """Return path, size, time and SHA-256 of each input file; datasets of the hub cannot be compared later and have none."""
    found: list[dict[str, Any]] = []
    for index, run in enumerate(group_files_to_hash(work.inputs)):
        record = work.job.read_record(work.job.path("inputs", f"run-{index:05d}.json")) or {"sha256": []}
        for file, digest in zip(run, record["sha256"], strict=True):
            found.append({"path": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns, "sha256": digest})
    return found


def write_manifest(work: WorkingDirectory, groups: list[dict[str, Any]], duplicates: dict[str, int]) -> dict[str, Any]:
    """Write the manifest and return it; raise if a split is empty, or if the records do not add up.

    Args:
        work: the working directory.
        groups: records of all groups, in order.
        duplicates: number of documents dropped as duplicates, by reason.

    Raises:
        EmptySplitError: a split has no documents left after the removal of duplicates.
    """
    config, directory, found = work.job.config, work.job.corpus, sum_scans(work)
    splits = {
        split: make_split_record([shard for group in groups for shard in group["splits"][split]]) for split in SPLITS
    }
    check_splits(work, {split: content["documents"] for split, content in splits.items()})
    tokenizer = Tokenizer(directory / "tokenizer")
    dropped = found["dropped"] + Counter(duplicates)
    _check_records_add_up(work, found["records"], sum(content["documents"] for content in splits.values()), dropped)
    lossless = work.job.read_record(work.job.path(TOKENIZER_RECORD)) or {}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        **make_tokenizer_record(tokenizer, round_trip=lossless.get("round_trip")),
        "prep": {
            "options_sha256": hash_result_options(config),
            "options": result_options(config),
            "code": hash_code(config),
            "append_eos": True,
            "prepend_bos": tokenizer.begins_with_bos,
        },
        "versions": installed_versions() | {"python": platform.python_version()},
        "inputs": make_input_records(work),
        **work.listing.as_json(),
        **({"tasks": list_tasks(work)} if config.task_field else {}),
        "splits": splits,
        "records": found["records"],
        "input_bytes": found["input_bytes"],
        "damaged_bytes": found["damaged_bytes"],
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "cleaning": {"changed": found["changed"]},
        "replaced": found["replaced"],
        "bad": found["bad"],
        "contains_u2581": sum(group["contains_u2581"] for group in groups),
    }
    write_text(directory / MANIFEST, json.dumps(document, indent=1) + "\n")
    return document


def _check_records_add_up(work: WorkingDirectory, records: int, kept: int, dropped: Counter[str]) -> None:
    """Raise DataError if some of the records that were read are neither kept nor counted as dropped, or the other way round."""
    if records != kept + dropped.total():
        raise DataError(
            f"{records:,} records were read, but {kept:,} are kept and {dropped.total():,} dropped: the files in "
            f"{work.job.root} do not belong together. Run `rdt prep` again with --restart."
        )


def make_tokenizer_record(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """Return the manifest's fields about a tokenizer; `more` is added to the inner record "tokenizer"."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "pad": tokenizer.pad,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "file_sha256": sha256_of(tokenizer.file),
            "files": sorted(path.name for path in tokenizer.file.parent.iterdir()),
            **more,
        },
    }


def make_split_record(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest's entry of a split: totals over its shards, and their records."""
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "text_bytes")}
    return {**totals, "shards": shards}


def print_splits(document: dict[str, Any]) -> None:
    """Print the size of every split of a manifest."""
    for split, content in document["splits"].items():
        print(f"{split}: {content['tokens']:,} tokens, {content['documents']:,} documents")


def print_summary(document: dict[str, Any]) -> None:
    """Print the contents of a prepared corpus, and how many documents were changed or dropped on the way."""
    print_splits(document)
    if document["cleaning"]["changed"]:
        print(f"changed by cleaning: {document['cleaning']['changed']:,} documents")
    lossless = document["tokenizer"]["round_trip"] or {"changed": 0}
    if lossless["changed"]:
        print(
            f"of {lossless['sampled']:,} documents, {lossless['changed']:,} come back changed from this tokenizer: it loses "
            "text, or they contain U+2581"
        )
    if document["replaced"]:
        print(f"invalid UTF-8 replaced in {document['replaced']:,} records")
    for line in describe_unread(document):
        print(line)
    if document["dropped"]:
        print("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in document["dropped"].items()))
    kept = sum(content["documents"] for content in document["splits"].values())
    print(f"records: {document['records']:,} read, {kept:,} kept, {sum(document['dropped'].values()):,} dropped")
    if document["damaged_bytes"]:
        print(
            f"damaged: {document['damaged_bytes']:,} of {document['input_bytes']:,} bytes of input are zero or in files that "
            "could not be read to their end; what each of them lost counts as one record"
        )
