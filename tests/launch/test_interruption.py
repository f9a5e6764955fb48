"""A signal at any moment before a command's work, or in it: one line, the right exit status, no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# In the place of a module: its import never ends.
ENDLESS_IMPORT = """\
import os, pathlib, time
pathlib.Path(os.environ["RDT_TEST_MARK"]).touch()
try:
    while True:
        time.sleep(0.1)
except BaseException:
    if "RDT_TEST_SWALLOW" not in os.environ:
        raise
raise ImportError("cannot load module more than once per process")
"""
# `rdt`, which gets a signal when it imports Dask; the process that it forks workers from gets none.
SIGNAL_AT_DASK = """\
import os, sys

class Finder:
    def find_spec(self, name, *rest):
        if name == "distributed":
            os.kill(os.getpid(), int(os.environ["RDT_TEST_SIGNAL"]))

sys.meta_path.insert(0, Finder())
from launch.cli import main
sys.exit(main())
"""
NOT_BEGUN = "before the first step, with nothing new to save; start again with the same options"
KEPT = "what is done is kept, the same command goes on"
RDT, SCRIPT = ["-m", "launch.cli"], ["launch/pretrain.py"]


def run_until_import(
    module: str, words: list[str], number: signal.Signals, tmp_path: Path, repository: Path
) -> tuple[int, str, str]:
    """Run Python with `words`, send it a signal when it imports `module`; return its exit status and both outputs."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / f"{module}.py").write_text(ENDLESS_IMPORT)
    mark = tmp_path / "mark"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}:{repository}", "RDT_TEST_MARK": str(mark)}
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("module", "words", "number", "status", "line"),
    [
        ("difflib", [*RDT, "train"], signal.SIGTERM, 75, f"rdt train: stopped on SIGTERM {NOT_BEGUN}"),
        ("difflib", [*RDT, "train"], signal.SIGINT, 75, f"rdt train: stopped on SIGINT {NOT_BEGUN}"),
        ("difflib", [*RDT, "train"], signal.SIGUSR1, 75, f"rdt train: stopped on SIGUSR1 {NOT_BEGUN}"),
        ("difflib", [*RDT, "eval", "a run"], signal.SIGINT, 130, "rdt eval: interrupted by SIGINT"),
        ("difflib", [*RDT, "--help"], signal.SIGTERM, 143, "rdt: interrupted by SIGTERM"),
        ("traceback", SCRIPT, signal.SIGTERM, 75, f"pretrain.py: stopped on SIGTERM {NOT_BEGUN}"),
        ("traceback", SCRIPT, signal.SIGINT, 75, f"pretrain.py: stopped on SIGINT {NOT_BEGUN}"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_a_signal_during_the_first_imports(
    module: str,
    words: list[str],
    number: signal.Signals,
    status: int,
    line: str,
    tmp_path: Path,
    repository: Path,
) -> None:
    assert run_until_import(module, words, number, tmp_path, repository) == (status, "", f"{line}\n")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_imports(
    number: signal.Signals, tmp_path: Path, repository: Path, tiny_options: list[str]
) -> None:
    words = [*RDT, "train", *tiny_options, f"--run.root={tmp_path / 'runs'}", "--parallel.engine=single"]
    found = run_until_import("torch", words, number, tmp_path, repository)
    assert found == (75, "", f"stopped on {number.name} {NOT_BEGUN}\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_command(number: signal.Signals, tmp_path: Path, repository: Path) -> None:
    words = [*RDT, "prep", "--sources", "README.md", "--out", str(tmp_path / "out")]
    line = f"rdt prep: interrupted by {number.name}; {KEPT}\n"
    assert run_until_import("sentencepiece", words, number, tmp_path, repository) == (128 + number, "", line)


def test_a_rank_above_0_says_nothing(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_until_import("json", SCRIPT, signal.SIGTERM, tmp_path, repository) == (75, "", "")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["compare", "scale"])
@pytest.mark.parametrize("module", ["difflib", "torch"])
def test_a_comparison_is_asked_to_stop(
    module: str, name: str, tmp_path: Path, repository: Path, tiny_options: list[str]
) -> None:
    """In its first imports, and in its own."""
    words = [*tiny_options, f"--run.root={tmp_path / 'runs'}", *["--budgets=6e9,8e9,1e10"] * (name == "scale")]
    found = run_until_import(module, [*RDT, name, *words], signal.SIGUSR1, tmp_path, repository)
    assert found == (75, "", f"rdt {name}: stopped on SIGUSR1; {KEPT}\n")


# A command that is signalled again while it cleans up, prints its last line and ends.
SIGNALLED_AGAIN = """\
import os, signal, sys, time
from launch import cli
from megatron_rdt.train import stop_request

def send():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)

def command(words):
    print("begun")
    try:
        send()
        while True:
            time.sleep(0.1)
    finally:
        if "twice" in sys.argv:
            stop_request.REPEAT_S = -1.0  # whatever comes next is a second request
        send()
        print("cleaned up")

cli.load_command = lambda name: command
status = cli.run_command(sys.argv[1:2])
send()
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["prep"], 143, f"rdt prep: interrupted by SIGTERM; {KEPT}\n"),
        (["compare"], 75, f"rdt compare: stopped on SIGTERM; {KEPT}\n"),
        (["eval", "twice"], 143, "rdt eval: interrupted by SIGTERM\n"),
    ],
    ids=["prep", "compare", "twice"],
)
def test_copies_of_a_signal_are_ignored_and_a_second_one_ends_at_once(
    words: list[str], status: int, line: str, repository: Path
) -> None:
    """Output is not lost in either case."""
    command = [sys.executable, "-c", SIGNALLED_AGAIN, *words]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100, check=False)
    output = "begun\n" if "twice" in words else "begun\ncleaned up\n"
    assert (result.returncode, result.stdout, result.stderr) == (status, output, line)


FINISHED = """\
import os, signal, sys
from launch import cli, interruption

def command(words):
    status = interruption.keep_status(3)
    os.kill(os.getpid(), signal.SIGTERM)
    return status

cli.load_command = lambda name: command
sys.exit(cli.run_command(["train"]))
"""


def test_a_signal_does_not_change_the_status_of_a_finished_run(repository: Path) -> None:
    command = [sys.executable, "-c", FINISHED]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "", "")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_prep_imports_dask(number: signal.Signals, tmp_path: Path, repository: Path) -> None:
    """The output is locked by then, in a thread that gets signals too, and there are files of the process that forks."""
    (tmp_path / "t").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "t"), "RDT_TEST_SIGNAL": str(int(number))}
    words = ["prep", "--sources=README.md", f"--out={tmp_path / 'out'}", "--workers=2"]
    command = [sys.executable, "-c", SIGNAL_AT_DASK, *words]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"rdt prep: interrupted by {number.name}; {KEPT}\n"
    assert not [*(tmp_path / "t").glob("pymp-*"), *tmp_path.glob(".out.lock")]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("module", "words", "status", "line"),
    [
        ("torch", [*RDT, "train", "--parallel.engine=single"], 75, f"stopped on SIGTERM {NOT_BEGUN}"),
        ("torch", [*SCRIPT, "--parallel.engine=single"], 75, f"stopped on SIGTERM {NOT_BEGUN}"),
        ("deepspeed", [*SCRIPT, "--parallel.engine=zero1"], 75, f"stopped on SIGTERM {NOT_BEGUN}"),
        ("sentencepiece", [*RDT, "prep", "--sources=README.md"], 143, f"rdt prep: interrupted by SIGTERM; {KEPT}"),
    ],
)
def test_an_import_that_swallows_exceptions(
    module: str,
    words: list[str],
    status: int,
    line: str,
    tmp_path: Path,
    repository: Path,
    tiny_options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As NumPy's does: what fails next fails for that. PyTorch's may abort the process instead."""
    monkeypatch.setenv("RDT_TEST_SWALLOW", "1")
    place = [f"--out={tmp_path / 'out'}"] if "prep" in words else [*tiny_options, f"--run.root={tmp_path / 'runs'}"]
    found = run_until_import(module, [*words, *place], signal.SIGTERM, tmp_path, repository)
    assert found == (status, "", f"{line}\n")
