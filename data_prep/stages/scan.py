"""First pass over the text: clean each document and keep one 45-byte row of it (hash, order key, size, split), no text."""

import contextlib
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from data_prep.cleaning import Cleaner
from data_prep.config import PrepConfig
from data_prep.jobs.progress import report_progress
from data_prep.jobs.working_directory import Job
from data_prep.sources.example_fields import ExampleFields
from data_prep.sources.folder_walk import name_unreadable
from data_prep.sources.hugging_face_files import SpoolWriter
from data_prep.sources.inputs import Input, Part
from data_prep.sources.records import Document, PartReader
from data_prep.stages.minhash import BandHasher
from data_prep.stages.scan_rows import SCAN_ROW, ArrayWriter, bands_path
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open, sha256_of

VALID_SCALE = 10_000  # resolution of valid_fraction
REPORT_BYTES = 1 << 20  # bytes of input between two reports of progress
MAX_TEXT_BYTES = 2**32 - 1
SEPARATOR = "\x1f"
_HALVES = struct.Struct(">QQ")  # a 128-bit digest as two integers that sort like its bytes


def hash_content(prompt: str, text: str, example: ExampleFields | None = None) -> bytes:
    """Return the hash of a document's prompt, text and fields of an example, 16 bytes."""
    content = f"{prompt}{SEPARATOR}{text}" if prompt else text
    if example is not None:
        content = SEPARATOR.join([content, *map(str, example)])
    return xxhash.xxh3_128_digest(content.encode("utf-8"))


def is_in_validation_split(digest: bytes, fraction: float) -> bool:
    """Return True if a document with this content hash is in the validation split, whatever other documents there are."""
    return int.from_bytes(digest, "big") % VALID_SCALE < fraction * VALID_SCALE


def hash_order_key(seed: int, name: str, number: int) -> bytes:
    """Return the sort key of a document in its group: a shuffle that depends on the seed and the document's position."""
    # Bytes of a name that are not UTF-8 are hashed as they are.
    return xxhash.xxh3_128_digest(f"{seed}{SEPARATOR}{name}{SEPARATOR}{number}".encode("utf-8", "surrogateescape"))


def join_digests(values: np.ndarray) -> bytes:
    """Return hashes or keys of rows, uint64 (n, 2), as digests: 16 bytes each, one after another."""
    return values.astype(">u8").tobytes()


def normalize_prompt(config: PrepConfig, prompt: str) -> str:
    """Return a prompt as it is encoded: normalised like texts, but not filtered."""
    return prompt if config.normalize == "none" else unicodedata.normalize(config.normalize, prompt)


def scan_rows_path(job: Job, part: Part) -> Path:
    """Return the path of a part's rows, SCAN_ROW (documents,)."""
    return job.path("scan", f"{part.name}.npy")


def scan_record_path(job: Job, part: Part) -> Path:
    """Return the path of the record of a part's scan."""
    return job.path("scan", f"{part.name}.json")


def spool_path(job: Job, part: Part) -> Path | None:
    """Return the path of the copy of a dataset shard; None for parts that are read from their files again."""
    return job.path("spool", f"{part.name}.jsonl.zst") if part.kind == "hub" else None


def scan_part(job: Job, part: Part, limit: int = 0) -> None:
    """Read and clean a part; write its rows, its bands and dataset copy where needed, then its record.

    Args:
        job: options and paths.
        part: the part to read.
        limit: stop after this many documents that are not empty; 0 takes all, -1 none.
    """
    config = job.config
    reader, cleaner = PartReader(part, config), Cleaner(config)
    hasher = BandHasher(config.near_threshold) if config.dedup == "near" else None
    # With validation sources, no document of the others is held out.
    fraction = 0.0 if config.valid_sources else config.valid_fraction
    files = [scan_rows_path(job, part)] + ([bands_path(scan_rows_path(job, part))] if hasher else [])
    found = {"documents": 0, "bytes": 0, "valid": 0, "changed": 0, "present": 0, "input_bytes": 0, "prompted": 0}
    tasks: set[str] = set()
    with contextlib.ExitStack() as stack:
        rows = ArrayWriter(stack.enter_context(atomic_open(files[0], "wb")), SCAN_ROW)
        bands = None
        if hasher:
            file = stack.enter_context(atomic_open(files[1], "wb"))
            bands = ArrayWriter(file, np.dtype("<u8"), (hasher.bands,))
        path = spool_path(job, part)
        spool = SpoolWriter(stack.enter_context(atomic_open(path, "wb"))) if path else None
        for document in _iterate_nonempty(reader, limit, found):
            text, reason = cleaner(document.text)
            prompt = normalize_prompt(config, document.prompt)
            if reason:
                reader.tally.dropped[reason] += 1
                continue
            # Hashes are of the cleaned text, so documents that cleaning makes equal are duplicates.
            digest = hash_content(prompt, text, document.example)
            size = len(text.encode("utf-8")) + len(prompt.encode("utf-8"))
            if size > MAX_TEXT_BYTES:
                raise DataError(f"document {document.location} has {size} bytes, more than {MAX_TEXT_BYTES}. Split it.")
            valid = part.valid or is_in_validation_split(digest, fraction)
            key = _HALVES.unpack(hash_order_key(config.seed, document.name, document.number))
            rows.add((_HALVES.unpack(digest), key, document.number, size, valid))
            if hasher and bands:
                # The prompt counts too: short answers to different questions are often the same.
                bands.add(hasher(f"{prompt} {text}" if prompt else text))
            if spool:
                # The original text: the second reading cleans it again, as it does that of files.
                spool.add(document.number, document.prompt, document.text)
            found["documents"] += 1
            found["bytes"] += size
            found["valid"] += valid
            found["changed"] += text != document.text
            found["prompted"] += bool(prompt)
            if document.example is not None:
                tasks.add(document.example.task)
        for writer in (rows, bands, spool):
            if writer:
                writer.finish()
    job.write_record(scan_record_path(job, part), files, {**found, "tasks": sorted(tasks), **reader.tally.as_json()})


def _iterate_nonempty(reader: PartReader, limit: int, found: dict[str, int]) -> Iterator[Document]:
    """Yield the documents that are not empty, up to `limit`; count them in `found`, and report progress.

    The number of these documents, and of the bytes of input that were read for them, go to `found` as `present` and
    `input_bytes`.
    """
    reported_bytes = reported_documents = 0
    for document in reader if limit >= 0 else ():
        if not document.text or document.text.isspace():
            reader.tally.dropped["empty"] += 1
            continue
        yield document
        found["present"] += 1
        if reader.position - reported_bytes >= REPORT_BYTES:
            report_progress(reader.position - reported_bytes, found["present"] - reported_documents)
            reported_bytes, reported_documents = reader.position, found["present"]
        if found["present"] == limit:
            found["input_bytes"] = reader.position
            break
    else:
        found["input_bytes"] = reader.part.size if limit >= 0 else 0
    # Positions of compressed files are approximate: the end makes up the rest of the part's size.
    report_progress(max(reader.part.size - reported_bytes, 0), found["present"] - reported_documents)


def scan_first_documents(job: Job, parts: list[Part]) -> None:
    """Scan parts in order up to `max_documents` documents; write empty scans of the rest, then a record."""
    left = job.config.max_documents
    for part in parts:
        record = job.read_record(scan_record_path(job, part))
        if record is None:
            scan_part(job, part, left or -1)
            record = job.read_record(scan_record_path(job, part))
        assert record is not None
        left -= record["present"]
    job.write_record(job.path("scan", "first.json"), [], {})


def hash_inputs(job: Job, name: str, files: list[Input]) -> None:
    """Write the SHA-256 of files into the record `name`."""
    hashes = []
    for file in files:
        with name_unreadable(file.path):
            hashes.append(sha256_of(file.path))
        report_progress(0)  # nothing of the text is done, but a job that failed elsewhere stops here
    job.write_record(job.path("inputs", f"{name}.json"), [], {"sha256": hashes})
