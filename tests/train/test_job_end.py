"""The end of a Slurm job: when a run is told of it, by clocks, environment and answers of squeue that a test chooses."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rdt.train import job_end
from megatron_rdt.train.job_end import wait_for_job_end
from megatron_rdt.train.stop_request import JOB_END, STOP_SIGNALS, StopBeforeTraining, StopRequest

NOON = 1_790_000_000  # by the clock of the machine when a run starts
SQUEUE = """\
#!/bin/sh
echo "$TZ $SLURM_TIME_FORMAT $*" >> "$0.calls"
[ -f "$0.answer-$(wc -l < "$0.calls")" ] || exit 1
cat "$0.answer-$(wc -l < "$0.calls")"
"""
CALL = "UTC0 standard --noheader --jobs=41 --format=%A|%e"


class Clocks:
    """The clocks of a machine. Pauses take no time, and end the wait after `most` seconds."""

    def __init__(self) -> None:
        self.wall, self.monotonic, self.paused, self.most = float(NOON), 50.0, 0.0, 1e9

    def pause(self, seconds: float) -> bool:
        self.wall += seconds
        self.monotonic += seconds
        self.paused += seconds
        return self.paused >= self.most


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Clocks that a test sets, in a process that is in no job."""
    clocks = Clocks()
    times = SimpleNamespace(time=lambda: clocks.wall, monotonic=lambda: clocks.monotonic)
    monkeypatch.setattr(job_end, "time", times)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    return clocks


def format_end(seconds_after_noon: float) -> str:
    """Return a time as squeue prints it in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(NOON + seconds_after_noon))


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a squeue on the path that gives these answers, one at a call, and then fails; return the file of its calls."""

    def make(*answers: str) -> Path:
        program = tmp_path / "squeue"
        program.write_text(SQUEUE)
        program.chmod(0o755)
        for number, text in enumerate(answers, 1):
            (tmp_path / f"squeue.answer-{number}").write_text(text)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "squeue.calls"

    return make


@pytest.mark.parametrize(("left", "before", "expected"), [(7200, 120, 7080), (400, 120, 300), (7200, 0.5, 7199.5)])
def test_the_moment_comes_before_the_end(
    left: float, before: float, expected: float, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a quarter of what was left: a job of a few minutes trains, too."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(NOON + left))
    assert wait_for_job_end(before, clocks.pause)
    assert clocks.paused == pytest.approx(expected)


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_changes_nothing(
    jump: float, clocks: Clocks, answer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(NOON + 20_000))
    answer(f"41|{format_end(20_000)}\n")

    def pause(seconds: float) -> bool:
        clocks.wall += jump
        return clocks.pause(seconds)

    assert wait_for_job_end(100, pause)
    assert clocks.paused == pytest.approx(19_900)


def test_a_job_that_was_extended_goes_on(
    clocks: Clocks, answer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Squeue lists every task of an array that has the number of its first one; the other's end is not ours."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(NOON + 3600))
    other = f"43|{format_end(99_999)}\n"
    calls = answer(
        f"{other}41|{format_end(7200)}\n", f"41|{format_end(9000)}\n{other}", f"{other}41|{format_end(9000)}\n"
    )
    assert wait_for_job_end(100, clocks.pause)
    assert clocks.paused == pytest.approx(8900)
    assert calls.read_text().splitlines() == [CALL] * 3
    assert capsys.readouterr().err.splitlines() == [
        "this Slurm job ends in 60:00 min; the run saves and stops 1:40 min before that (checkpoint.before_job_end_s)",
        "this Slurm job was extended by 60:00 min; the run goes on",
        "this Slurm job was extended by 30:00 min; the run goes on",
    ]


def test_a_limit_that_was_lifted(clocks: Clocks, answer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(NOON + 3600))
    answer("41|NONE\n")
    assert not wait_for_job_end(100, clocks.pause)
    assert clocks.paused == pytest.approx(3500)


@pytest.mark.parametrize("said", ["", "41|N/A\n", "41|\n", "42|2099-01-01T00:00:00\n", "slurm_load_jobs error\n"])
def test_without_an_answer_the_known_end_counts(
    said: str, clocks: Clocks, answer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(NOON + 3600))
    answer(*[said] * bool(said))
    assert wait_for_job_end(100, clocks.pause)
    assert clocks.paused == pytest.approx(3500)


@pytest.mark.parametrize("text", ["", "abc", "-5", "1.5", "²", str(NOON), str(NOON - 10**6)])
def test_a_wrong_variable_is_asked_for_or_named(
    text: str,
    clocks: Clocks,
    answer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slurm before 23.02 does not set it; a job that was extended may have one that is over."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    answer()
    assert not wait_for_job_end(100, clocks.pause)
    said = capsys.readouterr().err
    assert said.startswith("warning: the end of this Slurm job is not known: SLURM_JOB_END_TIME is ")
    assert (repr(text) if text else "not set") in said
    assert said.count("\n") == 1
    answer("", f"41|{format_end(3600)}\n", f"41|{format_end(3600)}\n")
    assert wait_for_job_end(100, clocks.pause)
    assert clocks.paused == pytest.approx(3500)


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": ""}, {"SLURM_JOB_END_TIME": "9" * 400}], ids=str)
def test_no_end_to_wait_for(
    variables: dict[str, str], clocks: Clocks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not wait_for_job_end(100, clocks.pause)
    assert (clocks.paused, capsys.readouterr().err) == (0, "")


def test_a_run_that_ends_before(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(NOON + 400 * 86400))  # Slurm gives a job without a limit a year
    clocks.most = 5000
    assert not wait_for_job_end(100, clocks.pause)
    assert clocks.paused == pytest.approx(7200)


def wait_in_start(stop: StopRequest) -> None:
    """Begin a start whose job ends at once, and wait for a minute in vain."""
    stop.begin_start()
    stop.watch_job(1000)
    for _ in range(6000):
        time.sleep(0.01)


def test_a_run_before_its_first_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    monkeypatch.setattr(job_end, "LARGEST_SHARE", 1.0)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    stop = StopRequest()
    try:
        with pytest.raises(StopBeforeTraining):
            wait_in_start(stop)
        assert stop.reason == JOB_END
    finally:
        stop.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_that_came_first_stays_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    monkeypatch.setattr(job_end, "LARGEST_SHARE", 1.0)
    stop = StopRequest()
    try:
        stop.reason = "SIGTERM"
        stop._watch_job(1000)  # the moment is now
        assert stop.reason == "SIGTERM"
        assert not stop._is_job_ending
    finally:
        stop.close()
