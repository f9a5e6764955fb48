"""Second pass over the text: encode the documents of a part that are kept, in the order of the part, into spill files."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.cleaning import Cleaner
from data_prep.jobs.progress import report_progress
from data_prep.jobs.working_directory import Job
from data_prep.sources.inputs import Part
from data_prep.sources.records import Document, PartReader
from data_prep.stages.encode_examples import encode_examples
from data_prep.stages.scan import (
    hash_content,
    hash_order_key,
    join_digests,
    normalize_prompt,
    scan_rows_path,
    spool_path,
)
from data_prep.stages.scan_rows import SCAN_ROW, ArrayWriter
from megatron_rdt.data.shard_files.indexed import MAX_SEQUENCE, token_dtype
from megatron_rdt.data.shard_files.side_files import EXAMPLE
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

CHUNK_BYTES = 1 << 18  # text that is encoded at a time
SLICE_BYTES, MOST_SLICES = 64_000_000, 16
DIGEST_BYTES = 16
# Tokens of a document, and of these in the prompt; of an example its task, difficulty and tokens of the answer.
SPILL_ROW = np.dtype([("tokens", "<u4"), ("prompt", "<u4"), *((name, EXAMPLE[name]) for name in EXAMPLE.names or ())])
TARGETS = ".targets"  # ending of the spill file of examples with the target of each column


def count_slices(text_bytes: int) -> int:
    """Return the number of slices that a part with so much text is encoded in, each by one worker.

    It is limited because a compressed file is read from its beginning for every slice.
    """
    return min(max(1, -(-text_bytes // SLICE_BYTES)), MOST_SLICES)


def spill_path(job: Job, part: Part, index: int, suffix: str) -> Path:
    """Return the path of a slice's tokens (`.bin`), TARGETS, rows (`.npy`: SPILL_ROW (documents,)) or record (`.json`)."""
    return job.path("encode", f"{part.name}-{index:02d}{suffix}")


@functools.lru_cache(1)
def _load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a folder; the latest one stays loaded in this process."""
    return Tokenizer(path)


def read_dropped_rows(job: Job, part: Part) -> np.ndarray:
    """Return the row numbers of a part's duplicates, uint32, ascending."""
    return np.load(job.path("duplicates", f"{part.name}.npy")) if job.config.dedup != "none" else np.empty(0, "<u4")


def read_kept_rows(job: Job, part: Part, index: int = 0, slices: int = 1) -> np.ndarray:
    """Return the scan rows of slice `index` of `slices` of a part that are not duplicates, SCAN_ROW (documents,)."""
    rows = np.load(scan_rows_path(job, part))
    if rows.dtype != SCAN_ROW:
        raise DataError(f"{scan_rows_path(job, part)} is not a scan of this version. Run `rdt prep` with --restart.")
    keep = np.ones(len(rows), bool)
    keep[read_dropped_rows(job, part)] = False
    # Slices are equal shares of all rows, duplicates included: workers have to read past those, too.
    keep[: len(rows) * index // slices] = False
    keep[len(rows) * (index + 1) // slices :] = False
    return rows[keep]


def read_kept_documents(job: Job, part: Part, rows: np.ndarray, lines_before: int | None = None) -> Iterator[Document]:
    """Read the documents of scan rows of a part again, cleaned as in the scan, in the order of the part.

    Args:
        job: options and paths.
        part: the part that they are in.
        rows: SCAN_ROW (documents,).
        lines_before: lines of the file before the part, if known.

    Raises:
        DataError: the file is no longer the one that was scanned.
    """
    if not len(rows):
        return
    config, cleaner = job.config, Cleaner(job.config)
    keys, hashes = join_digests(rows["key"]), join_digests(rows["hash"])
    found = 0

    def get_digest(digests: bytes) -> bytes:
        """Digest of the row that is looked for next."""
        return digests[DIGEST_BYTES * found : DIGEST_BYTES * (found + 1)]

    # Rows are in the order of the part: each document is compared with the next row alone. The order key identifies it
    # before it is parsed, so that dropped documents cost nothing but reading.
    def is_wanted(name: str, number: int) -> bool:
        """Return True if a document has the key of the row that is looked for next."""
        return hash_order_key(config.seed, name, number) == get_digest(keys)

    for document in PartReader(part, config, spool_path(job, part), is_wanted, lines_before):
        text, _ = cleaner(document.text)
        prompt = normalize_prompt(config, document.prompt)
        # A document at the same position with other content: the file changed.
        if hash_content(prompt, text, document.example) != get_digest(hashes):
            break
        yield dataclasses.replace(document, text=text, prompt=prompt)
        found += 1
        if found == len(rows):
            return
    raise DataError(
        f"{part.inputs[0].path} changed while it was prepared: its documents are not those of the first reading. "
        "Run `rdt prep` again."
    )


def no_target(dtype: np.dtype) -> int:
    """Return the value that spill files of targets have in columns that do not count; no id is as large."""
    return int(np.iinfo(dtype).max)


def encode_slice(job: Job, part: Part, index: int, slices: int, lines_before: int, tasks: list[str]) -> None:
    """Encode slice `index` of `slices` of a part into its spill files, then write its record.

    Args:
        job: options and paths.
        part, index, slices: the slice.
        lines_before: lines of the file before the part.
        tasks: names of all tasks that examples have.

    Raises:
        DataError: an id outside the vocabulary, a document that is too long, or a file that changed.
    """
    tokenizer = _load_tokenizer(job.corpus / "tokenizer")
    rows = read_kept_rows(job, part, index, slices)
    documents = read_kept_documents(job, part, rows, lines_before)
    suffixes = (".bin", ".npy", TARGETS) if job.config.task_field else (".bin", ".npy")
    files = [spill_path(job, part, index, suffix) for suffix in suffixes]
    tokens = with_space = 0
    with contextlib.ExitStack() as stack:
        tokens_file, rows_file, *targets_file = (stack.enter_context(atomic_open(file, "wb")) for file in files)
        spill_rows = ArrayWriter(rows_file, SPILL_ROW)
        for chunk in _chunk_documents(documents, rows["bytes"]):
            if targets_file:
                tokens += _encode_example_chunk(chunk, tokenizer, tasks, tokens_file, targets_file[0], spill_rows)
            else:
                tokens += _encode_chunk(chunk, tokenizer, tokens_file, spill_rows)
            with_space += sum(SPACE in document.text for document in chunk)
        spill_rows.finish()
    content = {"documents": len(rows), "tokens": tokens, "contains_u2581": with_space}
    job.write_record(spill_path(job, part, index, ".json"), files, content)


def _chunk_documents(documents: Iterator[Document], sizes: np.ndarray) -> Iterator[list[Document]]:
    """Yield lists of documents with CHUNK_BYTES of text, and report each as progress when it is done."""
    chunk: list[Document] = []
    held = 0
    for document, size in zip(documents, sizes):
        chunk.append(document)
        held += int(size)
        if held >= CHUNK_BYTES:
            yield chunk
            report_progress(held, len(chunk))
            chunk, held = [], 0
    if chunk:
        yield chunk
        report_progress(held, len(chunk))


def _encode_chunk(chunk: list[Document], tokenizer: Tokenizer, file: IO[Any], rows: ArrayWriter) -> int:
    """Append ids of each document to `file`, and its SPILL_ROW to `rows`; return the id count.

    A document is BOS, if the tokenizer's template puts it there, prompt, text and EOS.
    """
    texts = tokenizer.encode_batch([document.text for document in chunk])
    # A prompt is encoded by itself, so that the boundary between it and the text is between two tokens.
    prompts = [document.prompt for document in chunk]
    before = tokenizer.encode_batch(prompts) if any(prompts) else [np.empty(0, np.int32)] * len(chunk)
    bos = np.array([tokenizer.bos] if tokenizer.begins_with_bos else [], np.int32)
    eos = np.array([tokenizer.eos], np.int32)
    # One array for the whole chunk: checked, converted and written at once, which is faster than document by document.
    flat = np.concatenate([piece for prompt, text in zip(before, texts) for piece in (bos, prompt, text, eos)])
    lengths = [len(bos) + len(prompt) + len(text) + 1 for prompt, text in zip(before, texts)]
    _check_ids(chunk, lengths, flat, tokenizer)
    file.write(flat.astype(token_dtype(tokenizer.vocab_size)).tobytes())
    for length, prompt in zip(lengths, before):
        # BOS before a prompt is as little an answer as the prompt.
        rows.add((length, len(bos) + len(prompt) if len(prompt) else 0, 0, 0, 0))
    return len(flat)


def _encode_example_chunk(
    chunk: list[Document],
    tokenizer: Tokenizer,
    tasks: list[str],
    file: IO[Any],
    targets_file: IO[Any],
    rows: ArrayWriter,
) -> int:
    """Append ids of examples to `file`, their targets to `targets_file`, and SPILL_ROWs to `rows`; return the id count."""
    encoded = encode_examples(chunk, tokenizer)
    flat = np.concatenate([one.tokens for one in encoded])
    _check_ids(chunk, [len(one.tokens) for one in encoded], flat, tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    targets = np.concatenate([one.targets for one in encoded])
    targets_file.write(np.where(targets < 0, no_target(dtype), targets).astype(dtype).tobytes())
    file.write(flat.astype(dtype).tobytes())
    for document, one in zip(chunk, encoded):
        assert document.example is not None
        task = tasks.index(document.example.task)
        rows.add((len(one.tokens), 0, task, document.example.difficulty, one.answer))
    return len(flat)


def _check_ids(chunk: list[Document], lengths: list[int], flat: np.ndarray, tokenizer: Tokenizer) -> None:
    """Raise DataError if a document is too long or has an id outside the vocabulary.

    Args:
        chunk: the documents.
        lengths: of each in tokens.
        flat: ids of all, one document after the other.
        tokenizer: that encoded them.
    """
    if max(lengths) > MAX_SEQUENCE:
        longest = int(np.argmax(lengths))
        raise DataError(
            f"document {chunk[longest].location} has {lengths[longest]} tokens, more than {MAX_SEQUENCE}. Split it, or drop "
            "it with --max_chars."
        )
    if flat.max() >= tokenizer.vocab_size or flat.min() < 0:
        # For the message, find the first wrong id and the document that it is in.
        at = int(np.argmax((flat >= tokenizer.vocab_size) | (flat < 0)))
        document = chunk[int(np.searchsorted(np.cumsum(lengths), at, side="right"))]
        raise DataError(
            f"document {document.location} has id {flat[at]} but vocab_size is {tokenizer.vocab_size}. "
            "Use another --tokenizer."
        )
