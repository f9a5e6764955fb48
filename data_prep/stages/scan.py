"""First reading of a part: what is kept of each document is a row that says what decides its fate, not its text."""

import contextlib
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from data_prep.cleaning import Cleaner
from data_prep.config import PrepConfig
from data_prep.jobs.workers import advance
from data_prep.jobs.working_directory import Job
from data_prep.sources.hugging_face_files import Spool
from data_prep.sources.inputs import Input, Part
from data_prep.sources.records import Document, Reader
from data_prep.stages.duplicates import SCAN_ROW, bands_path
from data_prep.stages.minhash import Bands
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open, sha256_of

VALID_SCALE = 10_000
ROWS_HELD = 4096
COUNT_BYTES = 1 << 20  # report progress this often
MAX_TEXT_BYTES = 2**32 - 1
SEPARATOR = "\x1f"
_HALVES = struct.Struct(">QQ")


def content_hash(prompt: str, text: str) -> bytes:
    """128-bit hash of a document's content."""
    return xxhash.xxh3_128_digest((f"{prompt}{SEPARATOR}{text}" if prompt else text).encode("utf-8"))


def is_valid(digest: bytes, fraction: float) -> bool:
    """Whether a document of this content belongs to the validation split: stable when others come and go."""
    return int.from_bytes(digest, "big") % VALID_SCALE < fraction * VALID_SCALE


def order_key(seed: int, name: str, number: int) -> bytes:
    """Sort key of a document in its group: a shuffle that depends on the seed and on where the document stood."""
    return xxhash.xxh3_128_digest(f"{seed}{SEPARATOR}{name}{SEPARATOR}{number}".encode())


def digests(values: np.ndarray) -> bytes:
    """The hashes or keys of rows, uint64 (n, 2), as they were computed: 16 bytes each, one after another."""
    return values.astype(">u8").tobytes()


def cleaned_prompt(config: PrepConfig, prompt: str) -> str:
    """A prompt as it is encoded: normalised as texts are; filters are about texts."""
    return prompt if config.normalize == "none" else unicodedata.normalize(config.normalize, prompt)


def scan_path(job: Job, part: Part) -> Path:
    """Rows of a part, SCAN_ROW (documents,)."""
    return job.path("scan", f"{part.name}.npy")


def scan_record(job: Job, part: Part) -> Path:
    """Record of a part's scan."""
    return job.path("scan", f"{part.name}.json")


def spool_path(job: Job, part: Part) -> Path | None:
    """What is kept of a dataset shard; None for parts that are read again."""
    return job.path("spool", f"{part.name}.jsonl.zst") if part.kind == "hub" else None


class ArrayWriter:
    """Writes a .npy file row by row, in bounded memory.

    Args:
        file: open for writing.
        dtype: of the rows.
        width: of a second axis, or ().
    """

    def __init__(self, file: IO[Any], dtype: np.dtype, width: tuple[int, ...] = ()) -> None:
        self.file, self.dtype, self.width, self.count = file, dtype, width, 0
        self._rows: list[Any] = []
        self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow, so its length stays.
        shape = (self.count, *self.width)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, row: Any) -> None:
        """Append a row."""
        self._rows.append(row)
        if len(self._rows) >= ROWS_HELD:
            self._flush()

    def _flush(self) -> None:
        self.file.write(np.array(self._rows, self.dtype).tobytes())
        self.count += len(self._rows)
        self._rows = []

    def finish(self) -> None:
        """Write what is held, and the number of rows."""
        self._flush()
        begin = self.file.tell()
        self.file.seek(0)
        self._write_header()
        self.file.seek(begin)


def scan_part(job: Job, part: Part, limit: int = 0) -> None:
    """Read a part and write its rows and its record.

    Args:
        job: options and place.
        part: what to read.
        limit: stop after this many documents that are not empty; 0 takes all, -1 none.
    """
    config = job.config
    reader, cleaner = Reader(part, config), Cleaner(config)
    bands = Bands(config.near_threshold) if config.dedup == "near" else None
    fraction = 0.0 if config.valid_sources else config.valid_fraction
    files = [scan_path(job, part)] + ([bands_path(scan_path(job, part))] if bands else [])
    found = {"documents": 0, "bytes": 0, "valid": 0, "changed": 0, "present": 0}
    with contextlib.ExitStack() as stack:
        rows = ArrayWriter(stack.enter_context(atomic_open(files[0], "wb")), SCAN_ROW)
        sketches = None
        if bands:
            file = stack.enter_context(atomic_open(files[1], "wb"))
            sketches = ArrayWriter(file, np.dtype("<u8"), (bands.bands,))
        path = spool_path(job, part)
        spool = Spool(stack.enter_context(atomic_open(path, "wb"))) if path else None
        for document in _documents(reader, limit, found):
            text, reason = cleaner(document.text)
            prompt = cleaned_prompt(config, document.prompt)
            if reason:
                reader.tally.dropped[reason] += 1
                continue
            digest = content_hash(prompt, text)
            size = len(text.encode("utf-8")) + len(prompt.encode("utf-8"))
            if size > MAX_TEXT_BYTES:
                raise DataError(f"document {document.place} has {size} bytes, more than {MAX_TEXT_BYTES}. Split it.")
            valid = part.valid or is_valid(digest, fraction)
            key = _HALVES.unpack(order_key(config.seed, document.name, document.number))
            rows.add((_HALVES.unpack(digest), key, document.number, size, valid))
            if bands and sketches:
                # With what asks for them: short answers are often the same.
                sketches.add(bands(f"{prompt} {text}" if prompt else text))
            if spool:
                spool.add(document.number, document.prompt, document.text)
            found["documents"] += 1
            found["bytes"] += size
            found["valid"] += valid
            found["changed"] += text != document.text
        for writer in (rows, sketches, spool):
            if writer:
                writer.finish()
    job.write_record(scan_record(job, part), files, {**found, **reader.tally.as_json()})


def _documents(reader: Reader, limit: int, found: dict[str, int]) -> Iterator[Document]:
    """The documents that are not empty, up to `limit`, while progress is reported."""
    counted = documents = 0
    for document in reader if limit >= 0 else ():
        if not document.text or document.text.isspace():
            reader.tally.dropped["empty"] += 1
            continue
        yield document
        found["present"] += 1
        if reader.position - counted >= COUNT_BYTES:
            advance(reader.position - counted, found["present"] - documents)
            counted, documents = reader.position, found["present"]
        if found["present"] == limit:
            break
    advance(max(reader.part.size - counted, 0), found["present"] - documents)


def scan_first(job: Job, parts: list[Part]) -> None:
    """Scan parts one after another until `max_documents` are found; the others have no documents."""
    left = job.config.max_documents
    for part in parts:
        record = job.record(scan_record(job, part))
        if record is None:
            scan_part(job, part, left or -1)
            record = job.record(scan_record(job, part))
        assert record is not None
        left -= record["present"]
    job.write_record(job.path("scan", "first.json"), [], {})


def hash_inputs(job: Job, name: str, files: list[Input]) -> None:
    """Write the SHA-256 of files into the record `name`."""
    hashes = []
    for file in files:
        hashes.append(sha256_of(file.path))
        advance(0)
    job.write_record(job.path("inputs", f"{name}.json"), [], {"sha256": hashes})
