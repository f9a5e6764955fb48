"""Garbage collection during a run: at the configured steps only, and no step leaves tensors in cycles."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rdt.config import RunConfig
from megatron_rdt.errors import ConfigError
from megatron_rdt.train import trainer
from megatron_rdt.train.garbage_collection import YOUNGER_GENERATIONS, ScheduledGarbageCollection

pytestmark = pytest.mark.slow


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generation of every collection, appended when it begins."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.mark.parametrize(("every", "expected"), [(3, {3: 1, 6: 1}), (100, {})])
def test_steps_collect_when_it_is_due(
    every: int,
    expected: dict[int, int],
    collections: list[int],
    configure: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[int, int] = {}
    after_step, train_step = ScheduledGarbageCollection.collect_if_due, trainer.Trainer._train_step

    def watched(self: ScheduledGarbageCollection, step: int) -> None:
        assert not gc.isenabled()
        before = len(collections)
        after_step(self, step)
        if len(collections) > before:
            found[step] = collections[-1]

    def quiet(self: trainer.Trainer, *args: Any) -> Any:
        before = len(collections)
        taken = train_step(self, *args)
        assert len(collections) == before, "nothing collects within a step"
        return taken

    monkeypatch.setattr(ScheduledGarbageCollection, "collect_if_due", watched)
    monkeypatch.setattr(trainer.Trainer, "_train_step", quiet)
    options = ["--eval.every=0", "--checkpoint.every=0", f"--train.gc_every={every}"]
    assert trainer.train(configure(f"--run.root={tmp_path}", *options)) == 0
    assert found == expected
    assert set(expected.values()) <= {YOUNGER_GENERATIONS}
    assert gc.isenabled(), "as it was before"


def test_interval_0_leaves_the_collector_alone(collections: list[int]) -> None:
    with ScheduledGarbageCollection(0) as collection:
        assert gc.isenabled()
        collection.collect_if_due(50)
    assert gc.isenabled()
    gc.disable()
    try:
        with ScheduledGarbageCollection(1), pytest.raises(ZeroDivisionError), ScheduledGarbageCollection(5):
            _ = 1 / 0
        assert not gc.isenabled(), "as it was before"
    finally:
        gc.enable()


def test_a_negative_interval_is_refused(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"train\.gc_every is -1, it must be at least 0"):
        configure("--train.gc_every=-1")


def test_steps_leave_no_cycles_that_hold_memory(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two collections only reference counts free memory: no step may leave tensors in a cycle."""
    import torch

    left: list[int] = []
    after_step = ScheduledGarbageCollection.collect_if_due

    def watched(self: ScheduledGarbageCollection, step: int) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        if step > 1:  # the first one sets things up
            left.append(sum(thing.nbytes for thing in gc.garbage if isinstance(thing, torch.Tensor)))
        gc.garbage.clear()
        after_step(self, step)

    monkeypatch.setattr(ScheduledGarbageCollection, "collect_if_due", watched)
    options = ["--eval.every=0", "--checkpoint.every=0", "--train.steps=4", "--logging.monitor_every=1"]
    for policy in ("none", "per_iteration", "selective", "per_layer"):
        name = f"--run.name={policy}"
        assert trainer.train(configure(f"--run.root={tmp_path}", name, f"--depth.checkpoint={policy}", *options)) == 0
    assert len(left) == 12
    assert max(left) < 10_000, left
