"""A sample of the training documents that depends on their content and the seed, not on workers or machines."""

import numpy as np
import xxhash

from data_prep.jobs.working_directory import Job
from data_prep.sources.inputs import Part
from data_prep.sources.records import Document
from data_prep.stages.encode import read_kept_documents, read_kept_rows
from data_prep.stages.scan import scan_record_path
from data_prep.stages.tokenizer.train_sentencepiece import MAX_SENTENCE_BYTES

SPREAD = 16  # the sample is drawn from parts with this many times its size


def sample_texts(job: Job, parts: list[Part], limit: int) -> list[str]:
    """Return training texts with their prompts, about `limit` bytes or all, in the order of their content hashes.

    They are drawn from as many parts as have SPREAD times as much text. Long documents are cut to the length that training
    would cut them to. Memory: the sample, and the scan rows of these parts.
    """
    longest = max(limit // 100, MAX_SENTENCE_BYTES)
    chosen = _choose_parts(job, parts, SPREAD * limit)
    rows = [read_kept_rows(job, part) for part in chosen]
    rows = [kept[kept["valid"] == 0] for kept in rows]
    owner = np.repeat(np.arange(len(rows)), [len(kept) for kept in rows])  # index in `chosen` of each row
    if not len(owner):
        return []
    hashes = np.concatenate([kept["hash"] for kept in rows])
    sizes = np.concatenate([kept["bytes"] for kept in rows]).astype(np.int64)
    # The documents with the smallest content hashes are a random sample that does not depend on how the input was cut.
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    last = int(np.searchsorted(np.cumsum(np.minimum(sizes[order], longest)), limit))
    taken = np.zeros(len(owner), bool)
    taken[order[: last + 1]] = True
    # The texts are read part by part, each file once, and put into the order of the hashes afterwards.
    found: list[tuple[bytes, str]] = []
    for index, (part, kept) in enumerate(zip(chosen, rows)):
        wanted = kept[taken[owner == index]]
        hashed = wanted["hash"].astype(">u8")  # big-endian: bytes then sort like the pair of numbers
        found += [
            (hashed[i].tobytes(), _join_prompt_and_text(document)[:longest])
            for i, document in enumerate(read_kept_documents(job, part, wanted))
        ]
    return [text for _, text in sorted(found)]


def _join_prompt_and_text(document: Document) -> str:
    """Return a document as one text; prompt and answer of an example are apart, for its symbols are words."""
    separator = " " if document.example is not None else ""
    return f"{document.prompt}{separator}{document.text}"


def _choose_parts(job: Job, parts: list[Part], limit: int) -> list[Part]:
    """Return scanned training parts, in an order that the seed decides, until they have `limit` bytes of text."""
    order = sorted(parts, key=lambda part: xxhash.xxh3_128_digest(f"{job.config.seed}\x1f{part.index}".encode()))
    taken, size = [], 0
    for part in order:
        if size >= limit:
            break
        record = job.read_record(scan_record_path(job, part))
        if record is not None and not part.valid:
            taken.append(part)
            size += record["bytes"]
    return taken
