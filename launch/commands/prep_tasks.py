"""`rdt prep tasks`: generated reasoning tasks as JSONL, for `rdt prep` to turn into shards."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText

if TYPE_CHECKING:
    from data_prep.reasoning.examples import FileRequest, WrittenTasks
    from data_prep.reasoning.instances import Task


@dataclass(frozen=True)
class TaskOptions:
    """Options of `rdt prep tasks`."""

    task: list[str] = field(default_factory=lambda: ["hops"])
    """One or several of hops[:NODES], product[:GROUP], prefixes[:GROUP], parity, addition[:DIGITS], modular[:MODULUS], composition[:ENTITIES] and systematic[:ENTITIES], mixed evenly; a group is C2 to C999, S3 to S7 or A3 to A7, and GROUP:generators multiplies a few elements that generate it."""
    test_task: list[str] = field(default_factory=list)
    """Tasks of test.jsonl; by default those of `task`."""
    difficulty: list[int | str] = field(default_factory=lambda: [1, 8])
    """Length of the chain of reasoning: hops, multiplications, additions, nesting of the expression. Numbers and ranges, such as 1,2,3-7, drawn uniformly or by `weights`; two numbers alone, without weights, are the ends of a range."""
    weights: list[int] = field(default_factory=list)
    """Weight of each entry of `difficulty` in train.jsonl, a whole number; a range shares its weight evenly."""
    test_difficulty: list[int | str] = field(default_factory=list)
    """Difficulties of test.jsonl, drawn uniformly; by default those of `difficulty`."""
    format: Literal["text", "symbols"] = "text"
    """Notation of the examples. text: digits and signs, for any tokenizer; symbols: every element one token, with a tokenizer of these beside the files."""
    labels: bool = False
    """With `format: symbols`, add the answer at every position, which the input does not contain."""
    count: int = 20_000
    """Examples in train.jsonl."""
    test_count: int = 500
    """Examples in test.jsonl; 0 writes none."""
    seed: int = 0
    """Seed of the examples; whether an example belongs to train or test does not depend on it."""
    duplicates: bool = False
    """Allow an example to occur more than once in train.jsonl."""
    out: PathText = "data/tasks"
    """Directory to write train.jsonl and test.jsonl into."""
    restart: bool = False
    """Replace the train.jsonl and test.jsonl that are in `out`."""


def tasks(words: list[str]) -> int:
    """Write generated reasoning tasks with exact answers: train.jsonl and test.jsonl, which share no example."""
    from data_prep.reasoning import examples, symbol_files

    options = parse_options("prep tasks", summary_of(tasks), TaskOptions, words, config_file=True, positional=False)
    requests = _check_options(options)
    out = Path(os.path.expanduser(options.out))
    families = list({task.name: task for request in requests.values() for task in request.tasks}.values())
    make_record, write_companions = examples.make_text_record, lambda: None
    if options.format == "symbols":
        vocabulary = symbol_files.list_vocabulary(families)
        make_record = examples.make_labeled_record if options.labels else examples.make_symbol_record

        def write_companions() -> None:
            symbol_files.write_symbol_tokenizer(out / symbol_files.TOKENIZER, vocabulary)
            symbol_files.write_prep_options(out, options.out.rstrip("/"), bool(options.test_count), options.labels)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out {out} cannot be written: {error.strerror}. Set --out.") from error
    written = examples.write_tasks(out, requests, options.seed, make_record, write_companions)
    _print_counts(out, requests, written)
    for one in written.first:
        print(" ".join(map(str, list(make_record(one).values())[:2])))
    if options.format == "symbols":
        # Prompt, answer, BOS and EOS; with labels the answer is no token.
        columns = written.longest[examples.TRAIN] + 2 - bool(options.labels)
        print(f"for training: model.vocab_size {len(vocabulary)}, train.sequence_length {columns - 1} or more")
        print(f"next: rdt prep --config {out / symbol_files.PREP_OPTIONS}")
    return EXIT_OK


def _print_counts(out: Path, requests: "dict[str, FileRequest]", written: "WrittenTasks") -> None:
    """Print the number of examples of each file by task and difficulty, and which difficulties have few instances."""
    from data_prep.reasoning.examples import TEST_SHARE

    for split, request in requests.items():
        path = out / f"{split}.jsonl"
        if not request.size:
            if path.exists():
                print(f"{path} was there before and is left as it is")
            continue
        print(f"{path}: {request.size:,} examples")
        for task in request.tasks:
            numbers = {
                d: written.examples[split, task.name, d]
                for d in sorted({*request.mix.values, *_list_difficulties(written, split, task.name)})
            }
            print(f"  {task.name} by difficulty {', '.join(f'{d}: {n:,}' for d, n in numbers.items())}")
            fair = request.size / len(request.tasks) / len(request.mix.values)
            for difficulty, number in numbers.items():
                total = task.count_instances(difficulty)
                # Of a small difficulty a split may have few instances, or none.
                if number < fair / 2 and total < TEST_SHARE * fair and not request.duplicates:
                    print(
                        f"  difficulty {difficulty} has {total:,} different instances; {number:,} of them are in this file"
                    )


def _list_difficulties(written: "WrittenTasks", split: str, task: str) -> set[int]:
    """Return the difficulties that a file has of a task, required ones outside the range included."""
    return {difficulty for of, name, difficulty in written.examples if (of, name) == (split, task)}


def _check_options(options: TaskOptions) -> "dict[str, FileRequest]":
    """Check the options and the files they would replace; return the examples of each file, by split.

    Raises:
        ConfigError: an option is wrong, or a file is there that must not be replaced; the message names the first one.
    """
    from data_prep.reasoning.difficulties import DifficultyMix
    from data_prep.reasoning.examples import FileRequest
    from data_prep.reasoning.instances import TEST, TRAIN
    from data_prep.reasoning.tasks import check_difficulty

    train_tasks = _parse_tasks("task", options.task)
    test_tasks = _parse_tasks("test_task", options.test_task) if options.test_task else train_tasks
    mix = DifficultyMix(options.difficulty, options.weights)
    # Without a list of their own, tests draw the same difficulties, each as often as the others.
    test_mix = DifficultyMix(options.test_difficulty or options.difficulty, option="test_difficulty")
    for name, least in (("count", 1), ("test_count", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"{name} is {getattr(options, name)}, it must be at least {least}. Set --{name}.")
    check_difficulty(train_tasks, mix)
    if options.test_count:
        check_difficulty(test_tasks, test_mix, "test_difficulty" if options.test_difficulty else "difficulty")
    for task in train_tasks:
        if task.decides_split and task.list_required is None:
            raise ConfigError(
                f"{task.name} has no training examples. Name it in --test_task, and composition in --task."
            )
    graphs = {task.name.partition(":")[2] for task in train_tasks if task.decides_split}
    for task in test_tasks if options.test_count else ():
        graph = task.name.partition(":")[2]
        if task.decides_split and graph not in graphs:
            raise ConfigError(
                f"{task.name} asks for facts of a graph that no training task has. Name composition:{graph} in --task."
            )
    if options.labels and options.format != "symbols":
        raise ConfigError("labels need one token for each element. Set --format symbols, or omit --labels.")
    for task in (*train_tasks, *test_tasks) if options.labels else ():
        if task.labels_hint:
            raise ConfigError(f"{task.name} {task.labels_hint}.")
    for split in (TRAIN, TEST):
        path = Path(os.path.expanduser(options.out)) / f"{split}.jsonl"
        if path.exists() and not options.restart:
            raise ConfigError(f"{path} already exists. Set another --out, or --restart to replace it.")
        if path.exists() and not _holds_examples(path):
            raise ConfigError(f"{path} was not written by `rdt prep tasks`; it is kept as it is. Set another --out.")
    return {
        TRAIN: FileRequest(train_tasks, mix, options.count, options.duplicates),
        TEST: FileRequest(test_tasks, test_mix, options.test_count),
    }


def _parse_tasks(option: str, names: list[str]) -> "list[Task]":
    """Return the tasks that an option names; ConfigError if there are none, an unknown one, or one twice."""
    from data_prep.reasoning.tasks import parse_task

    if not names:
        raise ConfigError(f"{option} is empty. Set --{option} to one or several tasks, such as hops,addition.")
    if len(set(names)) < len(names):
        raise ConfigError(f"{option} {','.join(names)} has a task that is given twice. Give each once in --{option}.")
    return [parse_task(name) for name in names]


def _holds_examples(path: Path) -> bool:
    """Return True if the first line of a file is an example of `rdt prep tasks`."""
    from data_prep.reasoning.examples import LABELED_FIELDS, RECORD_FIELDS

    try:
        with open(path, encoding="utf-8") as file:
            record = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and tuple(record) in (RECORD_FIELDS, LABELED_FIELDS)
