"""`rdt prep tasks`: generated reasoning tasks as JSONL, for `rdt prep` to turn into shards."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText

if TYPE_CHECKING:
    from data_prep.reasoning.tasks import Task


@dataclass(frozen=True)
class TaskOptions:
    """Options of `rdt prep tasks`."""

    task: list[str] = field(default_factory=lambda: ["hops"])
    """One or several of hops[:NODES], product[:GROUP], prefixes[:GROUP], addition[:DIGITS] and modular[:MODULUS], mixed evenly; a group is C2 to C999, S3 to S7 or A3 to A7."""
    difficulty: list[int] = field(default_factory=lambda: [1, 8])
    """Length of the chain of reasoning: hops, multiplications, additions, nesting of the expression. One number, or the smallest and the largest of a range, from which it is drawn uniformly."""
    count: int = 20_000
    """Examples in train.jsonl."""
    test_count: int = 500
    """Examples in test.jsonl; 0 writes none."""
    seed: int = 0
    """Seed of the examples; whether an example belongs to train or test does not depend on it."""
    duplicates: bool = False
    """Allow an example to occur more than once within a file."""
    out: PathText = "data/tasks"
    """Directory to write train.jsonl and test.jsonl into."""
    restart: bool = False
    """Replace the train.jsonl and test.jsonl that are in `out`."""


def tasks(words: list[str]) -> int:
    """Write generated reasoning tasks with exact answers: train.jsonl and test.jsonl, which share no example."""
    from data_prep.reasoning.examples import TEST, TRAIN, write_tasks

    options = parse_options("prep tasks", summary_of(tasks), TaskOptions, words, config_file=True, positional=False)
    families, (easiest, hardest) = _check_options(options)
    out = Path(os.path.expanduser(options.out))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out {out} cannot be written: {error.strerror}. Set --out.") from error
    counts = {TRAIN: options.count, TEST: options.test_count}
    written = write_tasks(out, families, easiest, hardest, counts, options.seed, options.duplicates)
    for split in (split for split in counts if counts[split]):
        print(f"{out / split}.jsonl: {counts[split]:,} examples")
        for family in families:
            numbers = (f"{d}: {written.examples[split, family.name, d]:,}" for d in range(easiest, hardest + 1))
            print(f"  {family.name} by difficulty {', '.join(numbers)}")
    left = out / f"{TEST}.jsonl"
    if not options.test_count and left.exists():
        print(f"{left} was there before and is left as it is")
    for one in written.first:
        print(f"{one.prompt} {one.answer}")
    return EXIT_OK


def _check_options(options: TaskOptions) -> "tuple[list[Task], tuple[int, int]]":
    """Check the options and the files they would replace; return the tasks and the (easiest, hardest) difficulty.

    Raises:
        ConfigError: an option is wrong, or a file is there that must not be replaced; the message names the first one.
    """
    from data_prep.reasoning.examples import TEST, TRAIN
    from data_prep.reasoning.tasks import check_difficulty, parse_task

    if not options.task:
        raise ConfigError("task is empty. Set --task to one or several tasks, such as hops,addition.")
    if len(set(options.task)) < len(options.task):
        raise ConfigError(f"task {','.join(options.task)} has a task that is given twice. Give each once in --task.")
    if len(options.difficulty) not in (1, 2):
        raise ConfigError(
            f"difficulty has {len(options.difficulty)} numbers. Set --difficulty to one, or to a range: 1,8."
        )
    for name, least in (("count", 1), ("test_count", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"{name} is {getattr(options, name)}, it must be at least {least}. Set --{name}.")
    families = [parse_task(name) for name in options.task]
    difficulty = options.difficulty[0], options.difficulty[-1]
    check_difficulty(families, *difficulty)
    for split in (TRAIN, TEST):
        path = Path(os.path.expanduser(options.out)) / f"{split}.jsonl"
        if path.exists() and not options.restart:
            raise ConfigError(f"{path} already exists. Set another --out, or --restart to replace it.")
        if path.exists() and not _holds_examples(path):
            raise ConfigError(f"{path} was not written by `rdt prep tasks`; it is kept as it is. Set another --out.")
    return families, difficulty


def _holds_examples(path: Path) -> bool:
    """Return True if the first line of a file is an example of `rdt prep tasks`."""
    from data_prep.reasoning.examples import RECORD_FIELDS

    try:
        with open(path, encoding="utf-8") as file:
            record = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and tuple(record) == RECORD_FIELDS
