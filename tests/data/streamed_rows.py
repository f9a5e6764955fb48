"""A dataset of 120 rows that tests stream, and the batches of a loader as plain values."""

import json
from pathlib import Path

from megatron_rdt.data import BatchLoader


def text(number: int) -> str:
    return f"row {number} says " + "word " * (number * 7 % 23) + str(number * number)


def write_rows(folder: Path) -> str:
    """Write 120 rows into four files, one of them blank; return the dataset's name for a config."""
    for part in range(4):
        rows = [{"text": text(i) if i != 50 else " ", "id": i} for i in range(30 * part, 30 * part + 30)]
        (folder / f"part-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def take_batches(loader: BatchLoader, count: int) -> list[tuple]:
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(count)]
    return [(batch.samples, batch.batch_rows, batch.tokens.tolist()) for batch in taken]
