"""The step that makes a corpus's tokenizer: train one on a sample of the documents, or copy the given one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.jobs.progress import report_progress
from data_prep.jobs.working_directory import TOKENIZER_RECORD, Job, install_directory
from data_prep.sources.inputs import Part
from data_prep.stages.tokenizer.sample_texts import sample_texts
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer
from data_prep.stages.tokenizer.write_tokenizer import (
    copy_tokenizer,
    count_round_trip_failures,
    write_tokenizer,
)

CHECKED_BYTES = 300_000  # text on which a given tokenizer is compared with its export
CHECKED_DOCUMENTS = 200


def tokenizer_record_path(job: Job) -> Path:
    """Return the path of the record of the finished tokenizer."""
    return job.path(TOKENIZER_RECORD)


def make_tokenizer(job: Job, parts: list[Part]) -> None:
    """Train the corpus's tokenizer or copy the given one, count texts that it changes, then write its record."""
    config = job.config
    directory = job.temporary_directory("tokenizer")
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
    install_directory(directory, final)
    job.write_record(tokenizer_record_path(job), sorted(final.iterdir()), {"round_trip": lossless})


def _report_each(texts: list[str]) -> Iterator[str]:
    """Yield the texts, reporting each as progress."""
    for text in texts:
        report_progress(len(text), 1)
        yield text
