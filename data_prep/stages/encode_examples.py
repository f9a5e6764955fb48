"""Encode the examples of tasks: tokens, the target of every column, and the example record of each document."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.sources.example_fields import NO_LABEL
from data_prep.sources.records import Document
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError, DataError


class EncodedExample(NamedTuple):
    """One document: an example of a task."""

    tokens: np.ndarray
    """BOS, the prompt and EOS where there are labels; else BOS, the prompt, the answer and EOS; int32 (n,)."""
    targets: np.ndarray
    """Id of the target in each column, -1 where none counts, int32 (n,)."""
    answer: int
    """Number of the last targets that are the answer."""


def check_marks_examples(tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a tokenizer has no BOS, with which every example begins."""
    if tokenizer.bos < 0:
        raise ConfigError(
            f"the tokenizer {tokenizer.file} has no BOS, with which examples of tasks begin. Name it in its settings, or take "
            "the tokenizer that `rdt prep tasks --format symbols` writes."
        )


def encode_examples(documents: Sequence[Document], tokenizer: Tokenizer) -> list[EncodedExample]:
    """Encode documents that have fields of an example; DataError naming the first that is none."""
    prompts = tokenizer.encode_batch([document.prompt for document in documents])
    answers = tokenizer.encode_batch([document.text for document in documents])
    rows = [document.example.labels.split() if document.example else [] for document in documents]
    labels = tokenizer.encode_batch([" ".join(word for word in row if word != NO_LABEL) for row in rows])
    unknown = tokenizer.token_id("<unk>")
    encoded = []
    for document, prompt, answer, row, ids in zip(documents, prompts, answers, rows, labels):
        if not len(answer):
            raise DataError(
                f"{document.location}: the answer of the example is empty. Remove the record, or give it one."
            )
        if unknown >= 0 and unknown in np.concatenate([prompt, answer, ids]):
            raise DataError(
                f"{document.location}: the example has a symbol that the tokenizer does not know. Take the tokenizer that was "
                "written with the examples."
            )
        if row:
            encoded.append(_place_labels(document, prompt, answer, row, ids, tokenizer))
            continue
        tokens = np.concatenate([[tokenizer.bos], prompt, answer, [tokenizer.eos]]).astype(np.int32)
        targets = np.full(len(tokens), -1, np.int32)
        targets[1 + len(prompt) : -1] = answer  # the EOS does not count: it is no part of the answer
        encoded.append(EncodedExample(tokens, targets, len(answer)))
    return encoded


def _place_labels(
    document: Document, prompt: np.ndarray, answer: np.ndarray, row: list[str], ids: np.ndarray, tokenizer: Tokenizer
) -> EncodedExample:
    """Place labels in the columns after the tokens that they are of; DataError if they do not fit.

    Args:
        document: for messages.
        prompt, answer: ids.
        row: label of each token of the prompt, or NO_LABEL.
        ids: of the labels, without NO_LABEL.
        tokenizer: that encoded them.
    """
    has_label = np.array([word != NO_LABEL for word in row])
    if len(row) != len(prompt) or len(ids) != has_label.sum():
        raise DataError(
            f"{document.location}: the prompt has {len(prompt)} tokens, its row of labels {len(row)} entries of {len(ids)} "
            f"tokens. Give one label of one token for each token of the prompt, or {NO_LABEL}."
        )
    if not np.array_equal(ids[-len(answer) :], answer):
        raise DataError(f"{document.location}: the last labels are not the answer {document.text!r}. Fix the record.")
    tokens = np.concatenate([[tokenizer.bos], prompt, [tokenizer.eos]]).astype(np.int32)
    targets = np.full(len(tokens), -1, np.int32)
    # The model knows token i once it has read column i + 1, after BOS: its label is the target of the next column.
    targets[2:][has_label] = ids
    return EncodedExample(tokens, targets, len(answer))
