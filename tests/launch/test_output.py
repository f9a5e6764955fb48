"""Streams that are closed, full or cannot encode a character end no run and leave no traceback."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt import terminal
from megatron_rdt.config import RunConfig
from megatron_rdt.train import trainer

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]
DDP = pytest.param(["--parallel.engine=ddp", "--nproc=2"], marks=pytest.mark.distributed, id="ddp")


@pytest.fixture(scope="module")
def trained(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert trainer.train(configure(f"--run.root={root}", "--train.steps=2", "--eval.every=0")) == 0
    return root / "run"


def run_without_reader(repository: Path, words: list[str], both: bool) -> tuple[int, str]:
    """Run `rdt WORDS` into a pipe that nobody reads, with standard error too if `both`; return status and errors."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "launch.cli", *words]
    errors = writing if both else subprocess.PIPE
    process = subprocess.Popen(command, cwd=repository, stdout=writing, stderr=errors, text=True)
    os.close(writing)
    _, said = process.communicate(timeout=100)
    return process.returncode, said or ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_cannot_be_encoded_are_escaped(
    encoding: str, rdt: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    result = rdt("generate", trained, "--prompt=☃", "--tokens=2", "--loops=1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("\\u2603")
    missing = rdt("generate", "☃", "--tokens=2")
    assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 1)
    assert "\\u2603" in missing.stderr


@pytest.mark.parametrize("both", [False, True])
def test_evaluations_are_written_where_nobody_reads_them(
    both: bool, repository: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    words = ["eval", str(trained), "--loops=1", "--sequences=2", f"--out={out}"]
    assert run_without_reader(repository, words, both) == (141, "")
    assert list(json.loads(out.read_text())["losses"]) == ["1"]


@pytest.mark.parametrize("words", [["prep", "verify"], ["prep", "show"]], ids=" ".join)
def test_no_traceback_without_a_reader(words: list[str], repository: Path, tiny_corpus: Path) -> None:
    assert run_without_reader(repository, [*words, str(tiny_corpus)], both=False) == (141, "")


def test_prep_leaves_no_traceback_without_a_reader(repository: Path, tiny_text: Path, tmp_path: Path, rdt: Run) -> None:
    """With two worker processes. Like any program it may end at its first line of output; it resumes."""
    words = ["prep", "--sources", str(tiny_text), "--out", str(tmp_path / "c"), "--vocab_size=512", "--workers=2"]
    words.append("--valid_fraction=0.2")
    status, errors = run_without_reader(repository, words, both=False)
    assert status == 141
    assert all(re.match(r"\w+: \d", line) for line in errors.splitlines()), errors
    assert run_without_reader(repository, words, both=True) == (141, "")
    assert rdt(*words).returncode == 0
    assert (tmp_path / "c" / "manifest.json").is_file()


@pytest.mark.parametrize("options", [pytest.param([], id="single"), DDP])
def test_training_continues_without_a_reader(
    options: list[str], repository: Path, tiny_options: list[str], tmp_path: Path
) -> None:
    status, errors = run_without_reader(
        repository, ["train", *tiny_options, *options, f"--run.root={tmp_path}"], both=False
    )
    assert status == 0
    assert errors.splitlines() == ["standard output cannot be written ([Errno 32] Broken pipe); training continues"]
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000008"


def test_training_continues_with_a_full_log(repository: Path, tiny_options: list[str], tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [sys.executable, "-m", "launch.cli", "train", *tiny_options, f"--run.root={tmp_path}"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, cwd=repository, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
    assert "No space left on device); training continues" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000008"


def test_progress_is_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.show_progress(100, "evaluate", "batches") as advance:
        for _ in range(100):
            clock[0] += 1.0
            advance(1)
    assert log.getvalue().splitlines() == [
        "evaluate: 30 of 100 batches, 70 s left",
        "evaluate: 60 of 100 batches, 40 s left",
        "evaluate: 90 of 100 batches, 10 s left",
    ]
    reading, writing = pty.openpty()
    with open(writing, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with terminal.show_progress(100, "evaluate", "batches") as advance:
            advance(100)
        shown = b""
        while b"100/100" not in shown:  # the kernel may hand over what was written in parts
            shown += os.read(reading, 10_000)
    os.close(reading)


def test_a_terminal_that_goes_away_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    with terminal.show_progress(3, "evaluate", "batches") as advance:
        advance(3)
    terminal.show_line("a line")
    printer = terminal.Printer("training")
    monkeypatch.setattr(sys, "stdout", Gone())
    printer.print_line("a line")
