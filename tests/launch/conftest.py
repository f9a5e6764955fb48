"""Fixtures that run the command line as a user does."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import start_ranks
from tests.launch.command_worker import command_line

Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def rdt(repository: Path) -> Callable[..., Result]:
    """Run `rdt WORDS` in a new process."""

    def run(*words: object, timeout: float = 100) -> Result:
        command = [sys.executable, "-m", "launch.cli", *map(str, words)]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def forked_rdt(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Run `rdt WORDS` in a forked process, which has imported everything: faster, for tests of many commands."""

    def run(*words: object, timeout: float = 100) -> Result:
        folder, texts = tmp_path_factory.mktemp("command"), [str(word) for word in words]
        with start_ranks(command_line, 1, texts, folder, repository, group=False) as ranks:
            (status,) = ranks.wait(timeout)
        return Result(texts, status, *((folder / name).read_text() for name in ("stdout", "stderr")))

    return run


@pytest.fixture
def start(repository: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start `rdt WORDS` without waiting for its end; what still runs when the test ends is killed, its workers with it."""
    started: list[subprocess.Popen[str]] = []

    def start_command(words: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launch.cli", *words]
        started.append(
            subprocess.Popen(command, cwd=repository, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
        return started[-1]

    yield start_command
    for process in started:
        process.kill()
        process.communicate()
