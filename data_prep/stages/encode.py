"""Second reading of a part: the documents that are kept, encoded, in the order of the part."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.cleaning import Cleaner
from data_prep.jobs.workers import advance
from data_prep.jobs.working_directory import Job
from data_prep.sources.inputs import Part
from data_prep.sources.records import Document, Reader
from data_prep.stages.duplicates import SCAN_ROW
from data_prep.stages.scan import ArrayWriter, cleaned_prompt, content_hash, digests, order_key, scan_path, spool_path
from megatron_rdt.data.shard_files.indexed import MAX_SEQUENCE, token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

CHUNK_BYTES = 1 << 18
SLICE_BYTES, MOST_SLICES = 64_000_000, 16
SPILL_ROW = np.dtype([("tokens", "<u4"), ("prompt", "<u4")])


def slice_count(text_bytes: int) -> int:
    """In how many slices a part of so much text is encoded, at the same time if there are workers.

    A compressed file is read from its beginning for each, so that there are few.
    """
    return min(max(1, -(-text_bytes // SLICE_BYTES)), MOST_SLICES)


def spill_path(job: Job, part: Part, index: int, suffix: str) -> Path:
    """A slice's tokens (`.bin`), rows (`.npy`: SPILL_ROW (documents,)) or record (`.json`)."""
    return job.path("encode", f"{part.name}-{index:02d}{suffix}")


@functools.lru_cache(1)
def _loaded(path: Path) -> Tokenizer:
    return Tokenizer(path)


def dropped_rows(job: Job, part: Part) -> np.ndarray:
    """Rows of a part's scan that are duplicates, uint32, ascending."""
    return np.load(job.path("duplicates", f"{part.name}.npy")) if job.config.dedup != "none" else np.empty(0, "<u4")


def kept_rows(job: Job, part: Part, index: int = 0, slices: int = 1) -> np.ndarray:
    """Rows of a slice of a part that are not duplicates, SCAN_ROW (documents,)."""
    rows = np.load(scan_path(job, part))
    if rows.dtype != SCAN_ROW:
        raise DataError(f"{scan_path(job, part)} is not a scan of this version. Run `rdt prep` with --restart.")
    keep = np.ones(len(rows), bool)
    keep[dropped_rows(job, part)] = False
    keep[: len(rows) * index // slices] = False
    keep[len(rows) * (index + 1) // slices :] = False
    return rows[keep]


def kept_documents(job: Job, part: Part, rows: np.ndarray, lines_before: int | None = None) -> Iterator[Document]:
    """The documents of scan rows of a part, which are in its order, cleaned.

    Args:
        job: options and place.
        part: where they are.
        rows: SCAN_ROW (documents,).
        lines_before: lines of the file before the part.

    Raises:
        DataError: the file is no longer what was scanned.
    """
    if not len(rows):
        return
    config, cleaner = job.config, Cleaner(job.config)
    keys, hashes = digests(rows["key"]), digests(rows["hash"])
    found = 0

    def wanted(name: str, number: int) -> bool:
        return order_key(config.seed, name, number) == keys[16 * found : 16 * found + 16]

    for document in Reader(part, config, spool_path(job, part), wanted, lines_before):
        text, _ = cleaner(document.text)
        prompt = cleaned_prompt(config, document.prompt)
        if content_hash(prompt, text) != hashes[16 * found : 16 * found + 16]:
            break
        yield Document(document.number, document.place, text, prompt, document.name)
        found += 1
        if found == len(rows):
            return
    raise DataError(
        f"{part.inputs[0].path} changed while it was prepared: its documents are not those of the first reading. "
        "Run `rdt prep` again."
    )


def encode_slice(job: Job, part: Part, index: int, slices: int, lines_before: int) -> None:
    """Encode slice `index` of `slices` of a part into its spill.

    Raises:
        DataError: an id outside the vocabulary, a document that is too long, or a file that changed.
    """
    tokenizer = _loaded(job.corpus / "tokenizer")
    rows = kept_rows(job, part, index, slices)
    documents = kept_documents(job, part, rows, lines_before)
    files = [spill_path(job, part, index, suffix) for suffix in (".bin", ".npy")]
    tokens = with_space = 0
    with atomic_open(files[0], "wb") as tokens_file, atomic_open(files[1], "wb") as rows_file:
        spill_rows = ArrayWriter(rows_file, SPILL_ROW)
        for chunk in _chunks(documents, rows["bytes"]):
            tokens += _write_chunk(chunk, tokenizer, tokens_file, spill_rows)
            with_space += sum(SPACE in document.text for document in chunk)
        spill_rows.finish()
    content = {"documents": len(rows), "tokens": tokens, "contains_u2581": with_space}
    job.write_record(spill_path(job, part, index, ".json"), files, content)


def _chunks(documents: Iterator[Document], sizes: np.ndarray) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    held = 0
    for document, size in zip(documents, sizes):
        chunk.append(document)
        held += int(size)
        if held >= CHUNK_BYTES:
            yield chunk
            advance(held, len(chunk))
            chunk, held = [], 0
    if chunk:
        yield chunk
        advance(held, len(chunk))


def _write_chunk(chunk: list[Document], tokenizer: Tokenizer, file: IO[Any], rows: ArrayWriter) -> int:
    """Append the ids of documents, each ended by EOS, and their rows; how many ids."""
    texts = tokenizer.encode_batch([document.text for document in chunk])
    prompts = [document.prompt for document in chunk]
    before = tokenizer.encode_batch(prompts) if any(prompts) else [np.empty(0, np.int32)] * len(chunk)
    eos = np.array([tokenizer.eos], np.int32)
    flat = np.concatenate([piece for prompt, text in zip(before, texts) for piece in (prompt, text, eos)])
    lengths = [len(prompt) + len(text) + 1 for prompt, text in zip(before, texts)]
    if max(lengths) > MAX_SEQUENCE:
        worst = int(np.argmax(lengths))
        raise DataError(
            f"document {chunk[worst].place} has {lengths[worst]} tokens, more than {MAX_SEQUENCE}. Split it, or leave it "
            "out with --max_chars."
        )
    if flat.max() >= tokenizer.vocab_size or flat.min() < 0:
        at = int(np.argmax((flat >= tokenizer.vocab_size) | (flat < 0)))
        place = chunk[int(np.searchsorted(np.cumsum(lengths), at, side="right"))].place
        raise DataError(
            f"document {place} has id {flat[at]} but vocab_size is {tokenizer.vocab_size}. Use another --tokenizer."
        )
    file.write(flat.astype(token_dtype(tokenizer.vocab_size)).tobytes())
    for length, prompt in zip(lengths, before):
        rows.add((length, len(prompt)))
    return len(flat)
