"""The command line, run as a user runs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def rdt(repository: Path) -> Callable[..., Result]:
    """`rdt WORDS` in a process of its own."""

    def run(*words: object, timeout: float = 100) -> Result:
        command = [sys.executable, "-m", "launch.cli", *map(str, words)]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=timeout, check=False)

    return run
