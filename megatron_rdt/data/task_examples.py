"""Examples of reasoning tasks read back from a corpus in groups of equal task and difficulty, to be scored."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_rdt.data.batch import Batch
from megatron_rdt.data.example_corpus import ExampleCorpus
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.open_shards import Shards
from megatron_rdt.data.shard_files.side_files import EXAMPLES
from megatron_rdt.errors import DataError

READ_RECORDS = 1 << 20  # example records that are read at a time


class ExampleGroup(NamedTuple):
    """Examples of one task and difficulty."""

    task: str
    difficulty: int
    batch: Batch
    """One example per row, padded to the longest; `loss_mask` is True exactly at the targets that are the answer."""
    trained: bool
    """True if the training split has this difficulty: of this task, or of any where it has nothing of this task."""


def read_example_groups(
    corpus: CorpusManifest | str | Path, split: str = "valid", limit: int = 200
) -> list[ExampleGroup]:
    """Read up to `limit` examples of each (task, difficulty) of a split, the first ones in the order of the split.

    Args:
        corpus: its manifest, verified or not, or its directory.
        split: "train" or "valid".
        limit: largest number of examples in a group.

    Returns:
        The groups, in the order of the manifest's tasks and of difficulties.

    Raises:
        DataError: the corpus holds no examples in this split, or is damaged.
    """
    manifest = corpus if isinstance(corpus, CorpusManifest) else load_manifest(corpus)
    shards = Shards(manifest, split)
    if not shards.has(EXAMPLES):
        raise DataError(
            f"split {split} of {manifest.directory} holds no examples of tasks. Make some with `rdt prep tasks`, and "
            "prepare them as docs/tasks.md shows."
        )
    chosen: dict[tuple[int, int], list[int]] = {}
    for first, examples in _read_records(shards):
        for group in np.unique(examples[["task", "difficulty"]]):
            numbers = chosen.setdefault((int(group["task"]), int(group["difficulty"])), [])
            found = np.flatnonzero(examples[["task", "difficulty"]] == group)
            numbers += (found[: limit - len(numbers)] + first).tolist()
    shards.close()
    trained = _find_trained(manifest)
    # Rows of length 1, lengthened to the longest document: each group below takes the columns that it needs.
    reader = ExampleCorpus(manifest, split, 1, 0, loss_mask=True, longer_rows=True)
    try:
        return [
            ExampleGroup(
                manifest.tasks[task],
                difficulty,
                reader.read_answers(np.array(numbers, np.int64)),
                difficulty in trained.get(task, set().union(*trained.values())),
            )
            for (task, difficulty), numbers in sorted(chosen.items())
        ]
    finally:
        reader.close()


def _read_records(shards: Shards) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of a split's example records: the number of the block's first document, EXAMPLE (n,)."""
    first = 0
    for shard in range(len(shards)):
        count = shards[shard].document_count
        for start in range(0, count, READ_RECORDS):
            yield first + start, shards[shard].read_examples(start, min(READ_RECORDS, count - start))
        first += count


def _find_trained(manifest: CorpusManifest) -> dict[int, set[int]]:
    """Return the difficulties that the training split has of each task, by the task's number."""
    found: dict[int, set[int]] = {}
    shards = Shards(manifest, "train")
    for _, examples in _read_records(shards) if shards.has(EXAMPLES) else ():
        for group in np.unique(examples[["task", "difficulty"]]):
            found.setdefault(int(group["task"]), set()).add(int(group["difficulty"]))
    shards.close()
    return found
