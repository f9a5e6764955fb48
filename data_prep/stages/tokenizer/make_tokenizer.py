"""The step that makes a corpus's tokenizer: train one on a sample of the documents, or copy the given one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.jobs.workers import advance
from data_prep.jobs.working_directory import TOKENIZER_RECORD, Job
from data_prep.sources.inputs import Part
from data_prep.stages.tokenizer.sample_texts import sample_texts
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer
from data_prep.stages.tokenizer.write_tokenizer import (
    copy_tokenizer,
    count_round_trip_failures,
    write_tokenizer,
)
from megatron_rdt.files import TEMPORARY_SUFFIX, sha256_of

CHECKED_BYTES = 300_000  # text on which a given tokenizer is compared with its export
CHECKED_DOCUMENTS = 200


def tokenizer_record(job: Job) -> Path:
    """Return the path of the record of the finished tokenizer."""
    return job.path(TOKENIZER_RECORD)


def make_tokenizer(job: Job, parts: list[Part]) -> None:
    """Write the corpus's tokenizer, then its record."""
    config = job.config
    # Several tasks may get here at the same time; the first to finish gives its directory the name.
    directory = job.path(f"tokenizer-{os.uname().nodename}-{os.getpid()}{TEMPORARY_SUFFIX}")
    shutil.rmtree(directory, ignore_errors=True)
    if config.tokenizer:
        texts = sample_texts(job, parts, CHECKED_BYTES)
        tokenizer = copy_tokenizer(config.tokenizer, directory, texts[:CHECKED_DOCUMENTS])
    else:
        texts = sample_texts(job, parts, config.tokenizer_sample_bytes)
        model = train_tokenizer(_report_each(texts), config)
        tokenizer = write_tokenizer(model, directory, texts[:CHECKED_DOCUMENTS])
    checked = texts[:CHECKED_DOCUMENTS]
    lossless = {"sampled": len(checked), "changed": count_round_trip_failures(tokenizer, checked)}
    final = job.corpus / "tokenizer"
    final.parent.mkdir(exist_ok=True)
    take_name(directory, final)
    job.write_record(tokenizer_record(job), sorted(final.iterdir()), {"round_trip": lossless})


def _report_each(texts: list[str]) -> Iterator[str]:
    """Yield the texts, reporting each as progress."""
    for text in texts:
        advance(len(text), 1)
        yield text


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
