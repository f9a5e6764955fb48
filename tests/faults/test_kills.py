"""A run whose ranks are killed at random moments, again and again, ends with the losses of one that was left alone."""

import contextlib
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from tests.checkpoint.runs import list_all_names, read_losses
from tests.distributed.processes import Ranks
from tests.distributed.training import start_training, train_on
from tests.faults.conftest import RecordCost

KILLS = int(os.environ.get("RDT_KILLS", "12"))  # `make fuzz` has 50
SEED = int(os.environ.get("RDT_KILLS_SEED", "17"))
EVERY = 3  # steps between checkpoints
STEPS = 2 * KILLS + 20
POLL_S = 0.005
# A launcher ends the other ranks when one has died; they mostly end by themselves before.
GRACE_S = 1.0


@dataclass(frozen=True)
class Kill:
    """One kill: of a rank, some time after a moment of the run.

    Attributes:
        moment: "start" of the processes, "load" of a checkpoint, a "step", a "save".
        steps: that the processes have done before it, for a "step".
        delay_s: between the moment and the kill.
        rank: that is killed.
    """

    moment: str
    steps: int
    delay_s: float
    rank: int


LONGEST_DELAY_S = {"start": 0.6, "load": 0.3, "step": 0.1, "save": 0.03}


def draw_kills(number: int, seed: int) -> list[Kill]:
    """Draw the kills of a run."""
    generator = random.Random(seed)
    moments = generator.choices(("start", "load", "step", "save"), weights=(1, 1, 4, 3), k=number)
    return [
        Kill(moment, generator.randint(1, 4), generator.uniform(0, LONGEST_DELAY_S[moment]), generator.randint(0, 1))
        for moment in moments
    ]


class KilledRun:
    """A run on two ranks, started again after each kill; counts what the kills cost.

    Attributes:
        repeated: steps that were done again, of each kill after which the run resumed.
        lost_s: seconds from a kill, or from the first of several, until the run was where it had been.
        in_save: kills that left a save unfinished.
    """

    def __init__(self, run: Path, options: list[str]) -> None:
        self.run, self.options = run, options
        self.repeated: list[int] = []
        self.lost_s: list[float] = []
        self.in_save = 0
        self._reached = 0  # the furthest step before the last kill
        self._killed_at: float | None = None  # time of the first kill since the run was last there
        self._last_reached = 0  # `_reached` before the start that is under way

    def _look(self, ranks: Ranks) -> tuple[str, int]:
        """Return the output of rank 0 and its last step; note when the run is where it was before it was killed."""
        text = ranks.read_output(0)
        step = max([int(number) for number in re.findall(r"\bstep (\d+)/", text)], default=0)
        if self._killed_at is not None and step >= max(self._reached, 1):
            self.lost_s.append(time.monotonic() - self._killed_at)
            self._killed_at = None
        return text, step

    def _find_unfinished_saves(self) -> set[tuple[str, int]]:
        """Name and inode of each hidden directory that a save is writing, or that a killed one left."""
        found = set()
        for folder in self.run.glob("checkpoints/.step-*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((folder.name, folder.stat().st_ino))
        return found

    def _wait_for(self, kill: Kill, ranks: Ranks, leftovers: set[tuple[str, int]]) -> None:
        """Return when the moment of a kill has come; fail if the run ends before."""
        while True:
            text, step = self._look(ranks)
            resumed = re.search(r"resumed from \S+ \(step (\d+)\)", text)
            come = {
                "start": True,
                "load": "from checkpoint step-" in text or "starts anew" in text,
                "step": step >= kill.steps + (int(resumed[1]) if resumed else 0),
                "save": bool(self._find_unfinished_saves() - leftovers),
            }
            if come[kill.moment]:
                return
            assert not ranks.has_ended(), ranks.format_report()
            time.sleep(POLL_S)

    def kill_once(self, kill: Kill) -> None:
        """Start the ranks, kill one of them, and end the other as a launcher does."""
        leftovers = self._find_unfinished_saves()
        with start_training(self.options, 2) as ranks:
            self._wait_for(kill, ranks, leftovers)
            time.sleep(kill.delay_s)
            assert not ranks.has_ended(), ranks.format_report()
            ranks.kill(kill.rank)
            killed_at = time.monotonic()
            text, step = self._look(ranks)
            self._reached = max(self._reached, step)
            if self._killed_at is None:
                self._killed_at = killed_at
            ranks.processes[1 - kill.rank].join(GRACE_S)
        self._count_repeated(text)
        self.in_save += bool(self._find_unfinished_saves() - leftovers)
        for checkpoint in checkpoints.list_complete_checkpoints(self.run):
            checkpoints.verify(checkpoint)

    def _count_repeated(self, text: str) -> None:
        """Note how many steps a start that resumed has to do again; each is counted once, with the kill before it."""
        resumed = re.search(r"resumed from \S+ \(step (\d+)\)", text)
        if resumed:
            self.repeated.append(max(self._last_reached - int(resumed[1]), 0))
        self._last_reached = self._reached

    def finish(self) -> None:
        """Train to the end."""
        with start_training(self.options, 2) as ranks:
            while not ranks.has_ended():
                self._look(ranks)
                time.sleep(POLL_S)
            assert ranks.wait(10) == [0, 0], ranks.format_report()
            self._count_repeated(ranks.read_output(0))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_killed_again_and_again(tmp_path: Path, faulty_options: list[str], record_cost: RecordCost) -> None:
    options = [*faulty_options, f"--run.root={tmp_path}", f"--train.steps={STEPS}", f"--checkpoint.every={EVERY}"]
    train_on(2, [*options, "--run.name=straight"])
    killed = KilledRun(tmp_path / "killed", [*options, "--run.name=killed", "--resume=auto"])
    kills = draw_kills(KILLS, SEED)
    for kill in kills:
        killed.kill_once(kill)
    killed.finish()
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "straight")
    assert list(read_losses(tmp_path / "killed")) == list(range(1, STEPS + 1))
    last = f"step-{STEPS:08d}"
    manifests = [checkpoints.read_manifest(tmp_path / run / "checkpoints" / last) for run in ("straight", "killed")]
    states = [
        {name: file for name, file in manifest["files"].items() if name.endswith(".distcp")} for manifest in manifests
    ]
    assert states[0] == states[1], "weights and optimizer state, byte for byte"
    assert not [name for name in list_all_names(tmp_path / "killed") if name.startswith(".")]
    assert killed.in_save or KILLS < 10
    assert max(killed.repeated) <= EVERY + 1
    record_cost(
        f"SIGKILL of a rank, {KILLS} times in {STEPS} steps, {killed.in_save} of them in a save; per kill",
        sum(killed.lost_s) / KILLS,
        f"{sum(killed.repeated) / KILLS:.1f}, at most {max(killed.repeated)}",
    )
