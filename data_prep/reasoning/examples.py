"""Examples of reasoning tasks in disjoint train and test splits, drawn without a stored state, and their JSONL files.

An example is a function of (task, difficulty, seed, index). A hash of its content alone decides its split, so no example
occurs in both splits, whatever the seeds and counts of the files.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.reasoning.difficulties import DifficultyMix
from data_prep.reasoning.instances import TEST, TRAIN, Instance, Symbols, Task
from data_prep.reasoning.random_stream import RandomStream
from data_prep.reasoning.tasks import check_difficulty
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import atomic_open

RECORD_FIELDS = ("prompt", "text", "task", "difficulty")  # of a line of the files, without labels
LABELED_FIELDS = ("prompt", "text", "labels", "task", "difficulty")
TEST_SHARE = 10  # one in so many instances belongs to the test split
MAX_DRAWS = 10_000  # draws without a new example after which the instances count as used up
SHOWN_EXAMPLES = 3


class Example(NamedTuple):
    """An instance of a task, with its split."""

    task: str
    difficulty: int
    prompt: str
    answer: str
    symbols: Symbols
    key: int
    """Hash of the content: the same for any order of edges or operands."""
    split: str
    """TRAIN or TEST: decided by the key, unless the task decides it."""


class FileRequest(NamedTuple):
    """The examples that a file is to have."""

    tasks: Sequence[Task]
    mix: DifficultyMix
    size: int
    duplicates: bool = False
    """True if an instance may occur more than once."""


def make_example(task: Task, difficulty: int, seed: int, index: int) -> Example:
    """Make example `index` of the endless sequence of (task, difficulty, seed), the same on every machine."""
    stream = RandomStream(f"{task.name}\x1f{difficulty}\x1f{seed}\x1f{index}")
    return _to_example(task, difficulty, task.make(stream, difficulty))


def _to_example(task: Task, difficulty: int, instance: Instance) -> Example:
    """Return an instance with its key and split."""
    key = xxhash.xxh3_64_intdigest(instance.content.encode())
    split = instance.split or (TEST if key % TEST_SHARE == 0 else TRAIN)
    return Example(task.name, difficulty, instance.prompt, instance.answer, instance.symbols, key, split)


def generate_examples(request: FileRequest, split: str, seed: int) -> Iterator[Example]:
    """Yield examples of one split, from each task in turn, with difficulties drawn by their weights.

    Instances that a training file must contain come first. A difficulty whose instances are used up is drawn again, so
    that small difficulties may have fewer examples.

    Args:
        request: tasks, difficulties and number of examples.
        split: TRAIN or TEST.
        seed: of the sequence.

    Raises:
        ConfigError: there are not enough different instances.
    """
    tasks = request.tasks
    check_difficulty(tasks, request.mix)
    required = [_list_required(task, request, split) for task in tasks]
    drawn = [itertools.count() for _ in tasks]
    kinds = [task.name.partition(":")[0] for task in tasks]
    # Per kind, not per task: addition:1 and addition:2 have sums in common.
    seen: dict[str, set[int]] = {kind: set() for kind in kinds}
    for number in range(request.size):
        turn = number % len(tasks)
        task, taken = tasks[turn], seen[kinds[turn]]
        found = next(required[turn], None)
        if found is None:
            found = next(_draw(task, request, split, seed, drawn[turn], taken), None)
        if found is None:
            raise ConfigError(_too_few_message(task, request, split, number // len(tasks)))
        taken.add(found.key)
        yield found


def _draw(
    task: Task, request: FileRequest, split: str, seed: int, indices: Iterator[int], taken: set[int]
) -> Iterator[Example]:
    """Yield the examples of a split among the next MAX_DRAWS indices that are not taken yet, or may be repeated."""
    for index in itertools.islice(indices, MAX_DRAWS):
        choice = xxhash.xxh3_64_intdigest(f"{task.name}\x1f{seed}\x1f{index}\x1fdifficulty".encode())
        one = make_example(task, request.mix.draw(choice), seed, index)
        if one.split == split and (request.duplicates or one.key not in taken):
            yield one


def _list_required(task: Task, request: FileRequest, split: str) -> Iterator[Example]:
    """Yield the examples that a file must contain; ConfigError if the task's part of the file is too small for them."""
    if split != TRAIN or task.list_required is None:
        return iter(())
    instances = list(task.list_required())
    share = request.size // len(request.tasks)
    if share < len(instances):
        raise ConfigError(
            f"{task.name} has {len(instances):,} facts, which are all in the training file, but only {share:,} of "
            f"{request.size:,} examples are of this task. Set --count to at least {len(instances) * len(request.tasks)}."
        )
    return (_to_example(task, 1, instance) for instance in instances)


def _too_few_message(task: Task, request: FileRequest, split: str, found: int) -> str:
    """Message for a task that has fewer different instances in a split than were asked for."""
    total = sum(map(task.count_instances, request.mix.values))
    share = (
        f"about {TEST_SHARE - 1} in {TEST_SHARE} of them are"
        if split == TRAIN
        else f"about one in {TEST_SHARE} of them is"
    )
    if task.decides_split:
        share = "some or all of them"
    wanted = -(-request.size // len(request.tasks))
    may_repeat = split == TRAIN and not request.duplicates
    fewer = ", ask for fewer, or set --duplicates" if may_repeat else ", or ask for fewer"
    hardest = max(request.mix.values)
    # Of a small task, longer chains are no more than shorter ones, or there are none.
    has_more = hardest != task.hardest and task.count_instances(hardest + 1) > task.count_instances(hardest)
    larger = f"Take {task.name.partition(':')[0]} with a larger number after the colon"
    advice = f"{'Raise --difficulty' if has_more else larger}{fewer if found else ''}"
    return (
        f"{task.name} with difficulty {request.mix.describe()} has {total:,} different instances, {share} for {split}: "
        f"{found:,} were found, {wanted:,} are asked for. {advice}."
    )


class WrittenTasks(NamedTuple):
    """Summary of the files that `write_tasks` wrote."""

    examples: Counter[tuple[str, str, int]]
    """Number of examples by split, task and difficulty."""
    longest: dict[str, int]
    """Largest number of symbols of an example by split, prompt and answer together."""
    first: list[Example]
    """The first few examples, to look at."""


def make_text_record(one: Example) -> dict[str, object]:
    """Return the line of an example as text."""
    return dict(zip(RECORD_FIELDS, (one.prompt, one.answer, one.task, one.difficulty), strict=True))


def make_symbol_record(one: Example) -> dict[str, object]:
    """Return the line of an example as symbols."""
    prompt, answer = " ".join(one.symbols.prompt), " ".join(one.symbols.answer)
    return dict(zip(RECORD_FIELDS, (prompt, answer, one.task, one.difficulty), strict=True))


def make_labeled_record(one: Example) -> dict[str, object]:
    """Return the line of an example as symbols with labels, null where the task has none."""
    labels = None if one.symbols.labels is None else " ".join(one.symbols.labels)
    record = make_symbol_record(one) | {"labels": labels}
    return {field: record[field] for field in LABELED_FIELDS}


def write_tasks(
    out: Path,
    requests: Mapping[str, FileRequest],
    seed: int,
    make_record: Callable[[Example], dict[str, object]],
    write_companions: Callable[[], None] = lambda: None,
) -> WrittenTasks:
    """Write `out`/SPLIT.jsonl for every split with a count above 0, all complete or none; return a summary.

    Args:
        out: directory, which exists.
        requests: examples of each split.
        seed: see `generate_examples`.
        make_record: returns the line of an example.
        write_companions: writes the files that belong to them, once all examples were found.

    Raises:
        ConfigError: see `generate_examples`.
    """
    written, opened = WrittenTasks(Counter(), {}, []), []
    # The files stay open until all examples were found: a ConfigError then removes every one of them.
    with contextlib.ExitStack() as files:
        for split, request in requests.items():
            if request.size == 0:
                continue
            file = files.enter_context(atomic_open(out / f"{split}.jsonl"))
            for one in generate_examples(request, split, seed):
                file.write(json.dumps(make_record(one)) + "\n")
                written.examples[split, one.task, one.difficulty] += 1
                length = len(one.symbols.prompt) + len(one.symbols.answer)
                written.longest[split] = max(written.longest.get(split, 0), length)
                if len(written.first) < SHOWN_EXAMPLES:
                    written.first.append(one)
            opened.append(file)
        # Files are renamed one after another as they are closed: a full disk must show before the first rename.
        for file in opened:
            file.flush()
            os.fsync(file.fileno())
        write_companions()
    return written
