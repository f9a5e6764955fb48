"""The tokenizer of a corpus: trained on a sample that no number of workers or machines changes, or a given one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from data_prep.jobs.workers import advance
from data_prep.jobs.working_directory import TOKENIZER_RECORD, Job
from data_prep.sources.inputs import Part
from data_prep.stages.encode import kept_documents, kept_rows
from data_prep.stages.scan import scan_record
from data_prep.tokenizer import (
    MAX_SENTENCE_BYTES,
    copy_tokenizer,
    round_trip_failures,
    train_tokenizer,
    write_tokenizer,
)
from megatron_rdt.files import TEMPORARY_SUFFIX, sha256_of

SPREAD = 16  # the sample is drawn from this many times its size
CHECKED_BYTES = 300_000  # a given tokenizer is compared with its export on so much text
CHECKED_DOCUMENTS = 200


def tokenizer_record(job: Job) -> Path:
    """Record of the finished tokenizer."""
    return job.path(TOKENIZER_RECORD)


def make_tokenizer(job: Job, parts: list[Part]) -> None:
    """Write the corpus's tokenizer and its record."""
    config = job.config
    # Several tasks may get here at the same time; the first to finish gives its directory the name.
    directory = job.path(f"tokenizer-{os.uname().nodename}-{os.getpid()}{TEMPORARY_SUFFIX}")
    shutil.rmtree(directory, ignore_errors=True)
    if config.tokenizer:
        texts = sample_texts(job, parts, CHECKED_BYTES)
        tokenizer = copy_tokenizer(config.tokenizer, directory, texts[:CHECKED_DOCUMENTS])
    else:
        texts = sample_texts(job, parts, config.tokenizer_sample_bytes)
        tokenizer = write_tokenizer(train_tokenizer(_counted(texts), config), directory, texts[:CHECKED_DOCUMENTS])
    checked = texts[:CHECKED_DOCUMENTS]
    lossless = {"sampled": len(checked), "changed": round_trip_failures(tokenizer, checked)}
    final = job.corpus / "tokenizer"
    final.parent.mkdir(exist_ok=True)
    take_name(directory, final)
    job.write_record(tokenizer_record(job), sorted(final.iterdir()), {"round_trip": lossless})


def take_name(directory: Path, final: Path) -> None:
    """Rename a directory of files, in the place of what has the name.

    A task that was as far has the same content, and its directory stays: others may be reading it. Any other content is
    damaged, or was left by a prep that ended before its record and went on with other options.
    """
    try:
        directory.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        if not _same_files(directory, final):
            shutil.rmtree(final)
            directory.rename(final)
            return
        shutil.rmtree(directory)


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        sha256_of(one / name) == sha256_of(other / name) for name in names
    )


def _counted(texts: list[str]) -> Iterator[str]:
    for text in texts:
        advance(len(text), 1)
        yield text


def sample_texts(job: Job, parts: list[Part], limit: int) -> list[str]:
    """Training documents that are `limit` bytes together, or all, in the order of their contents' hashes.

    They come from as many parts as have SPREAD times as much text, in an order that depends on the seed; long documents
    are cut as the training of a tokenizer cuts them. Memory: the sample, and the rows of these parts.
    """
    longest = max(limit // 100, MAX_SENTENCE_BYTES)
    chosen = _parts_of_sample(job, parts, SPREAD * limit)
    rows = [kept_rows(job, part) for part in chosen]
    rows = [kept[kept["valid"] == 0] for kept in rows]
    owner = np.repeat(np.arange(len(rows)), [len(kept) for kept in rows])
    if not len(owner):
        return []
    hashes = np.concatenate([kept["hash"] for kept in rows])
    sizes = np.concatenate([kept["bytes"] for kept in rows]).astype(np.int64)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    last = int(np.searchsorted(np.cumsum(np.minimum(sizes[order], longest)), limit))
    taken = np.zeros(len(owner), bool)
    taken[order[: last + 1]] = True
    found: list[tuple[bytes, str]] = []
    for index, (part, kept) in enumerate(zip(chosen, rows)):
        mine = kept[taken[owner == index]]
        hashed = mine["hash"].astype(">u8")
        found += [
            (hashed[i].tobytes(), (document.prompt + document.text)[:longest])
            for i, document in enumerate(kept_documents(job, part, mine))
        ]
    return [text for _, text in sorted(found)]


def _parts_of_sample(job: Job, parts: list[Part], limit: int) -> list[Part]:
    """Parts in a keyed order until they have `limit` bytes of text."""
    order = sorted(parts, key=lambda part: xxhash.xxh3_128_digest(f"{job.config.seed}\x1f{part.index}".encode()))
    taken, size = [], 0
    for part in order:
        if size >= limit:
            break
        record = job.record(scan_record(job, part))
        if record is not None and not part.valid:
            taken.append(part)
            size += record["bytes"]
    return taken
