"""What is said of a corpus: the manifest, and the numbers of the scans that go into it."""

import json
import platform
from collections import Counter
from typing import Any

from data_prep.jobs.working_directory import TOKENIZER_RECORD, Plan, code_of, options_hash, options_of, versions
from data_prep.sources.inputs import Input
from data_prep.sources.records import BAD_LISTED, bad_message
from data_prep.stages.scan import scan_record
from data_prep.stages.write_shards import SPLITS
from megatron_rdt.data.shard_files.corpus_manifest import FORMAT, MANIFEST, VERSION
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of, write_text

HASH_BYTES = 64_000_000  # files are hashed in runs of about this size


class EmptySplitError(DataError):
    """The input has not the documents that are wanted: what was done with it is of no use."""


def lines_before(plan: Plan) -> list[int]:
    """For each part, lines of its file in the parts before it."""
    found, path, lines = [], "", 0
    for part in plan.parts:
        if part.inputs[0].path != path:
            path, lines = part.inputs[0].path, 0
        found.append(lines)
        record = plan.job.record(scan_record(plan.job, part))
        lines += record["lines"] if record else 0
    return found


def totals(plan: Plan) -> dict[str, Any]:
    """Sums over all scans: documents, valid (of these, in validation), bytes, records, dropped by reason, changed by
    cleaning, replaced, bad_count, and the first bad records in words."""
    sums: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    bad: list[str] = []
    for part, before in zip(plan.parts, lines_before(plan)):
        record = plan.job.record(scan_record(plan.job, part)) or {"dropped": {}, "bad": []}
        dropped.update(record["dropped"])
        for name in ("documents", "valid", "bytes", "records", "changed", "replaced", "bad_count"):
            sums[name] += record.get(name, 0)
        for path, line, message in record["bad"][: BAD_LISTED - len(bad)]:
            bad.append(bad_message(path, line and line + before, message))
    return {**sums, "dropped": dropped, "bad": bad}


def check_scan(plan: Plan) -> dict[str, Any]:
    """The totals of a scan that is worth going on with.

    Raises:
        DataError: too many records are bad.
        EmptySplitError: there is no document, or none for a split that is wanted.
    """
    config, found = plan.job.config, totals(plan)
    if found["bad_count"] > max(BAD_LISTED, config.max_bad * found["records"]):
        first = "\n  ".join(found["bad"][:3])
        raise DataError(
            f"{found['bad_count']:,} of {found['records']:,} records are bad, more than --max_bad {config.max_bad:g}; "
            f"the first:\n  {first}\nMend the input, or raise --max_bad."
        )
    if not found["documents"]:
        raise EmptySplitError(f"no document with text in {config.sources}. Check the sources and --text_field.")
    wants_valid = config.valid_fraction > 0 or bool(config.valid_sources)
    check_splits({"train": found["documents"] - found["valid"], "valid": found["valid"]}, wants_valid)
    return found


def check_splits(documents: dict[str, int], wants_valid: bool) -> None:
    """EmptySplitError where a split that is wanted has no document."""
    for split, count in documents.items():
        if not count and (split == "train" or wants_valid):
            raise EmptySplitError(
                f"the {split} split would be empty with {sum(documents.values())} documents. Add documents or change "
                "--valid_fraction."
            )


def hash_runs(inputs: list[Input]) -> list[list[Input]]:
    """Consecutive files, as many as are hashed at a time."""
    runs: list[list[Input]] = []
    size = 0
    for file in inputs:
        if not runs or size + file.bytes > HASH_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(file)
        size += file.bytes
    return runs


def input_records(plan: Plan) -> list[dict[str, Any]]:
    """What the manifest says of each file; what comes from the hub cannot be compared later and is not in it."""
    found: list[dict[str, Any]] = []
    for index, run in enumerate(hash_runs(plan.inputs)):
        record = plan.job.record(plan.job.path("inputs", f"run-{index:05d}.json")) or {"sha256": []}
        for file, digest in zip(run, record["sha256"], strict=True):
            found.append({"path": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns, "sha256": digest})
    return found


def write_manifest(plan: Plan, groups: list[dict[str, Any]], duplicates: dict[str, int]) -> dict[str, Any]:
    """Write the manifest of the records of all groups, in order; the document.

    Raises:
        EmptySplitError: a split has no document, now that duplicates are gone.
    """
    config, directory, found = plan.job.config, plan.job.corpus, totals(plan)
    splits = {split: _split([shard for group in groups for shard in group["splits"][split]]) for split in SPLITS}
    wants_valid = config.valid_fraction > 0 or bool(config.valid_sources)
    check_splits({split: content["documents"] for split, content in splits.items()}, wants_valid)
    tokenizer = Tokenizer(directory / "tokenizer")
    dropped = found["dropped"] + Counter(duplicates)
    lossless = plan.job.record(plan.job.path(TOKENIZER_RECORD)) or {}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        **tokenizer_fields(tokenizer, round_trip=lossless.get("round_trip")),
        "prep": {
            "options_sha256": options_hash(config),
            "options": options_of(config),
            "code": code_of(config),
            "append_eos": True,
        },
        "versions": versions() | {"python": platform.python_version()},
        "inputs": input_records(plan),
        "splits": splits,
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "cleaning": {"changed": found["changed"]},
        "replaced": found["replaced"],
        "bad": found["bad"],
        "contains_u2581": sum(group["contains_u2581"] for group in groups),
    }
    write_text(directory / MANIFEST, json.dumps(document, indent=1) + "\n")
    return document


def tokenizer_fields(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """What a manifest says of its tokenizer, which is in the folder of its own that the corpus has; `more` about it."""
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


def _split(shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "text_bytes")} | {
        "shards": shards
    }


def print_summary(document: dict[str, Any]) -> None:
    """Say on standard output what a corpus holds."""
    for split, content in document["splits"].items():
        print(f"{split}: {content['tokens']:,} tokens, {content['documents']:,} documents")
    if document["cleaning"]["changed"]:
        print(f"changed by cleaning: {document['cleaning']['changed']:,} documents")
    lossless = document["tokenizer"]["round_trip"] or {"changed": 0}
    if lossless["changed"]:
        print(
            f"of {lossless['sampled']:,} documents, {lossless['changed']:,} come back changed from this tokenizer: it loses "
            "text, or they hold U+2581"
        )
    if document["replaced"]:
        print(f"invalid UTF-8 replaced in {document['replaced']:,} records")
    if document["dropped"]:
        print("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in document["dropped"].items()))
