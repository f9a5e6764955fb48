"""Examples of reasoning tasks in disjoint train and test splits, drawn without a stored state, and their JSONL files.

An example is a function of (task, difficulty, seed, index). A hash of its content alone decides its split, so no example
occurs in both splits, whatever the seeds and counts of the files.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.reasoning.random_stream import WORD_BITS, RandomStream
from data_prep.reasoning.tasks import Task, check_difficulty
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import atomic_open

TRAIN, TEST = "train", "test"
RECORD_FIELDS = ("prompt", "text", "task", "difficulty")  # of a line of the files
TEST_SHARE = 10  # one in so many instances belongs to the test split
MAX_DRAWS = 10_000  # draws without a new example after which the instances count as used up
SHOWN_EXAMPLES = 3


class Example(NamedTuple):
    """An instance of a task, with the hash that decides its split."""

    task: str
    difficulty: int
    prompt: str
    answer: str
    key: int
    """Hash of the content: the same for any order of edges or operands."""

    @property
    def split(self) -> str:
        """The split that it belongs to, TRAIN or TEST."""
        return TEST if self.key % TEST_SHARE == 0 else TRAIN


def make_example(task: Task, difficulty: int, seed: int, index: int) -> Example:
    """Make example `index` of the endless sequence of (task, difficulty, seed), the same on every machine."""
    stream = RandomStream(f"{task.name}\x1f{difficulty}\x1f{seed}\x1f{index}")
    prompt, answer, content = task.make(stream, difficulty)
    return Example(task.name, difficulty, prompt, answer, xxhash.xxh3_64_intdigest(content.encode()))


def generate_examples(
    tasks: Sequence[Task], easiest: int, hardest: int, split: str, count: int, seed: int, duplicates: bool = False
) -> Iterator[Example]:
    """Yield examples of one split, from each task in turn, with difficulties drawn uniformly from `easiest` ... `hardest`.

    A difficulty whose instances are used up is drawn again, so that small difficulties may have fewer examples.

    Args:
        tasks: from `parse_task`.
        easiest, hardest: range of the difficulty.
        split: TRAIN or TEST.
        count: number of examples.
        seed: of the sequence.
        duplicates: whether an instance may occur more than once.

    Raises:
        ConfigError: there are not enough different instances.
    """
    check_difficulty(tasks, easiest, hardest)
    drawn = [itertools.count() for _ in tasks]
    kinds = [task.name.partition(":")[0] for task in tasks]
    # Per kind, not per task: addition:1 and addition:2 have sums in common.
    seen: dict[str, set[int]] = {kind: set() for kind in kinds}
    for number in range(count):
        turn = number % len(tasks)
        task, taken = tasks[turn], seen[kinds[turn]]
        for index in itertools.islice(drawn[turn], MAX_DRAWS):
            choice = xxhash.xxh3_64_intdigest(f"{task.name}\x1f{seed}\x1f{index}\x1fdifficulty".encode())
            difficulty = easiest + (choice * (hardest - easiest + 1) >> WORD_BITS)
            found = make_example(task, difficulty, seed, index)
            if found.split == split and (duplicates or found.key not in taken):
                taken.add(found.key)
                yield found
                break
        else:
            wanted = -(-count // len(tasks))
            raise ConfigError(_too_few_message(task, easiest, hardest, split, number // len(tasks), wanted, duplicates))


def _too_few_message(
    task: Task, easiest: int, hardest: int, split: str, found: int, wanted: int, duplicates: bool
) -> str:
    """Message for a task that has fewer different instances in a split than were asked for."""
    total = sum(map(task.count_instances, range(easiest, hardest + 1)))
    share = f"one in {TEST_SHARE} of them is" if split == TEST else f"{TEST_SHARE - 1} in {TEST_SHARE} of them are"
    span = str(hardest) if easiest == hardest else f"{easiest} to {hardest}"
    advice = "Raise --difficulty" + (", ask for fewer, or set --duplicates" if found and not duplicates else "")
    return (
        f"{task.name} with difficulty {span} has {total:,} different instances, about {share} for {split}: "
        f"{found:,} were found, {wanted:,} are asked for. {advice}."
    )


class WrittenTasks(NamedTuple):
    """Summary of the files that `write_tasks` wrote."""

    examples: Counter[tuple[str, str, int]]
    """Number of examples by split, task and difficulty."""
    first: list[Example]
    """The first few examples, to look at."""


def write_tasks(
    out: Path, tasks: Sequence[Task], easiest: int, hardest: int, counts: dict[str, int], seed: int, duplicates: bool
) -> WrittenTasks:
    """Write `out`/SPLIT.jsonl for every split with a count above 0, all complete or none; return a summary.

    Args:
        out: directory, which exists.
        tasks, easiest, hardest, seed, duplicates: see `generate_examples`.
        counts: number of examples of each split.

    Raises:
        ConfigError: see `generate_examples`.
    """
    written, opened = WrittenTasks(Counter(), []), []
    # The files stay open until all examples were found: a ConfigError then removes every one of them.
    with contextlib.ExitStack() as files:
        for split, count in counts.items():
            if count == 0:
                continue
            file = files.enter_context(atomic_open(out / f"{split}.jsonl"))
            for one in generate_examples(tasks, easiest, hardest, split, count, seed, duplicates):
                record = dict(zip(RECORD_FIELDS, (one.prompt, one.answer, one.task, one.difficulty), strict=True))
                file.write(json.dumps(record) + "\n")
                written.examples[split, one.task, one.difficulty] += 1
                if len(written.first) < SHOWN_EXAMPLES:
                    written.first.append(one)
            opened.append(file)
        # Files are renamed one after another as they are closed: a full disk must show before the first rename.
        for file in opened:
            file.flush()
            os.fsync(file.fileno())
    return written
