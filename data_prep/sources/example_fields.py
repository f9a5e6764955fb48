"""ExampleFields: what a record says of an example of a task, besides its prompt and text."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep.config import PrepConfig

MOST_DIFFICULTY = 2**32 - 1
MOST_TASK_CHARS = 200
NO_LABEL = "_"  # in a row of labels, a position without one


class ExampleFields(NamedTuple):
    """Task, difficulty and labels of an example."""

    task: str
    difficulty: int
    labels: str = ""
    """Answers at every position, separated by spaces, NO_LABEL where there is none; "" if the example has no labels."""


def list_record_fields(config: PrepConfig) -> list[str]:
    """Return the names of the fields of a record that prep reads, "" for those that it does not."""
    return [config.text_field, config.prompt_field, config.task_field, config.difficulty_field, config.label_field]


def take_example_fields(record: Mapping[str, Any], config: PrepConfig) -> ExampleFields | str:
    """Return the fields of an example, or what is wrong with one of them, to be put behind file and line."""
    task, difficulty = record.get(config.task_field), record.get(config.difficulty_field)
    labels = record.get(config.label_field) if config.label_field else None
    if not isinstance(task, str) or not 0 < len(task) <= MOST_TASK_CHARS or not task.isprintable():
        return f': field "{config.task_field}" is no name of a task: {task!r}'
    if isinstance(difficulty, bool) or not isinstance(difficulty, int) or not 0 <= difficulty <= MOST_DIFFICULTY:
        return f': field "{config.difficulty_field}" is no whole number from 0 to {MOST_DIFFICULTY}: {difficulty!r}'
    if labels is not None and not isinstance(labels, str):
        return f': field "{config.label_field}" is neither text nor null: {labels!r}'
    return ExampleFields(task, difficulty, labels or "")
