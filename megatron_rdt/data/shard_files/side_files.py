"""Side files of a shard: what Megatron's format has no place for, beside .bin and .idx and under the same prefix.

| file | holds |
|---|---|
| `.mask` | for each token one byte: 1 if it counts as a target of the loss, 0 if not |
| `.labels` | for each token the id that is the target in its column, in the tokens' type: a label, or the token itself |
| `.examples` | for each document one EXAMPLE: its task, its difficulty, and how many targets are the answer |

Like the mask, a label belongs to the column as a target: the model has seen the columns before it, not this one.
All documents of a split have a side file, or none has.
"""

import contextlib
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from megatron_rdt.data.shard_files.positioned_reads import REBUILD, prefix_path
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

# `task` is an index in the manifest's list of tasks; the last `answer` targets that count are the answer.
EXAMPLE = np.dtype([("task", "<u2"), ("difficulty", "<u4"), ("answer", "<u4")])


@dataclass(frozen=True)
class SideFile:
    """Kind of side file.

    Attributes:
        name: of the kind, also its suffix without the dot.
        noun, plural: name of what a document has, for messages.
        dtype: of a value; None is the type of the tokens.
        per_document: True if there is a value for each document, not for each token.
    """

    name: str
    noun: str
    plural: str
    dtype: np.dtype | None
    per_document: bool = False

    @property
    def suffix(self) -> str:
        """Ending of the file's name."""
        return f".{self.name}"

    @property
    def hash_key(self) -> str:
        """Key of the file's SHA-256 in the shard's record of the manifest."""
        return f"{self.name}_sha256"

    def value_dtype(self, token_dtype: np.dtype) -> np.dtype:
        """Return the type of a value in a shard with tokens of this type."""
        return token_dtype if self.dtype is None else self.dtype

    def describe_size_fault(self, size: int, token_dtype: np.dtype, tokens: int, documents: int) -> str:
        """Return how many bytes are due if `size` is not what a shard with these counts must have; else ""."""
        count, unit = (documents, "documents") if self.per_document else (tokens, "tokens")
        width = self.value_dtype(token_dtype).itemsize
        if size == count * width:
            return ""
        return f"{'one' if width == 1 else width} for each of {count} {unit} {'is' if width == 1 else 'are'} due"


MASK = SideFile("mask", "mask", "masks", np.dtype("u1"))
LABELS = SideFile("labels", "row of labels", "labels", None)
EXAMPLES = SideFile("examples", "task record", "examples", EXAMPLE, per_document=True)
SIDE_FILES = (MASK, LABELS, EXAMPLES)


class SideWriter:
    """Writes the side files of one shard, those that its first document has values for.

    Args:
        path: prefix of the shard.
        dtype: of the tokens.
        files: where opened files are entered; they get their names when it closes.
    """

    def __init__(self, path: Any, dtype: np.dtype, files: contextlib.ExitStack) -> None:
        self.path, self.dtype, self._files = path, dtype, files
        self._open: dict[SideFile, IO[Any]] | None = None  # None before the first document

    def add(self, source: str, values: dict[SideFile, np.ndarray | None]) -> None:
        """Append the values of one document.

        Args:
            source: name of the document in messages.
            values: of each kind, checked, None where the document has none.

        Raises:
            DataError: only some documents have values of a kind.
        """
        if self._open is None:
            self._open = {
                kind: self._files.enter_context(atomic_open(prefix_path(self.path, kind.suffix), "wb"))
                for kind, value in values.items()
                if value is not None
            }
        for kind, value in values.items():
            if (kind in self._open) != (value is not None):
                noun = kind.noun
                had = (
                    f"no {noun}, those before it have one" if value is None else f"a {noun}, those before it have none"
                )
                raise DataError(f"{source} has {had}: give a {noun} with every document of a shard, or with none.")
            if value is not None:
                self._open[kind].write(value.astype(kind.value_dtype(self.dtype)).tobytes())


def check_document_values(
    source: str, tokens: np.ndarray, vocab_size: int, values: dict[SideFile, np.ndarray | None]
) -> None:
    """Raise DataError if a document's mask, labels or task record do not fit its tokens.

    Args:
        source: name of the document in messages.
        tokens: ids, integers (n,).
        vocab_size: labels must be below it.
        values: mask and labels (n,), example (1,) of dtype EXAMPLE; None where the document has none.
    """
    mask, labels, example = (values.get(kind) for kind in SIDE_FILES)
    count = len(tokens)
    if mask is not None and (mask.shape != tokens.shape or mask.min() < 0 or mask.max() > 1):
        raise DataError(f"{source} has a mask that is not one 0 or 1 for each of its {count} tokens. Fix it.")
    if labels is not None and (labels.shape != tokens.shape or labels.min() < 0 or labels.max() >= vocab_size):
        raise DataError(f"{source} has labels that are not one id below {vocab_size} for each of its {count} tokens.")
    if example is None:
        return
    targets = count - 1 if mask is None else int(mask[1:].sum())
    if not 0 < int(example["answer"][0]) <= targets:
        raise DataError(
            f"{source} has an answer of {example['answer'][0]} tokens, but {targets} targets that count. Give it an answer."
        )


def describe_example_fault(examples: np.ndarray, tasks: int) -> str:
    """Describe the first example record that cannot be: a task that the manifest does not list, or no answer; else "".

    Args:
        examples: EXAMPLE (n,).
        tasks: number of tasks in the manifest.
    """
    wrong = np.flatnonzero((examples["task"] >= tasks) | (examples["answer"] == 0))
    if not len(wrong):
        return ""
    first = examples[wrong[0]]
    return f"record {wrong[0]:,} has task {first['task']} of {tasks} and an answer of {first['answer']} tokens"


def missing_side_file(path: Any) -> DataError:
    """Return the error of a side file that is read and does not exist."""
    return DataError(f"{path} does not exist. {REBUILD}")
