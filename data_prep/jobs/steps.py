"""A step of a stage: what is done, and the record that says so."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.jobs.progress import Progress
from data_prep.jobs.working_directory import Job


@dataclass(frozen=True)
class Step:
    """A piece of work that writes files, then a record.

    Attributes:
        name: unique in the working directory.
        record: path of the record; the step is done when it exists and fits its files.
        function: called with the job and the arguments.
        arguments: of the function.
        size: bytes, for progress.
        needs: names of steps that must be done before; they come earlier in the same stage.
    """

    name: str
    record: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    size: int = 0
    needs: frozenset[str] = frozenset()


RunSteps = Callable[[Job, list[Step], Progress], None]
"""Does steps, the first ones first; raises what a step raises."""
