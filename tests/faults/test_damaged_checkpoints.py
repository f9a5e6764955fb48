"""Damaged checkpoints are named and skipped, the newest intact one is resumed, and retention never takes the last one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from tests.checkpoint.runs import checkpoint_path, flip_bit, list_steps, read_losses
from tests.distributed.training import train_on
from tests.faults.conftest import RecordCost


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, faulty_options: list[str]) -> tuple[Path, list[str]]:
    """A run of 8 steps on two ranks with checkpoints at 2, 4, 6 and 8, and its options."""
    root = tmp_path_factory.mktemp("finished")
    options = [*faulty_options, "--run.name=r"]
    train_on(2, [*options, f"--run.root={root}", "--checkpoint.keep=0"])
    return root / "r", options


def find_shard(checkpoint: Path) -> Path:
    """The largest file that rank 1 wrote."""
    return max((checkpoint / "model").glob("__1_*.distcp"), key=lambda path: path.stat().st_size)


def cut(checkpoint: Path) -> str:
    """Cut a file of a checkpoint short; return its name."""
    shard = find_shard(checkpoint)
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def flip(checkpoint: Path) -> str:
    """Flip a bit in a file of a checkpoint; return its name."""
    flip_bit(find_shard(checkpoint))
    return find_shard(checkpoint).name


def remove(checkpoint: Path) -> str:
    """Remove a file of a checkpoint; return its name."""
    shard = find_shard(checkpoint)
    shard.unlink()
    return shard.name


def renew(checkpoint: Path) -> str:
    """Make a checkpoint one of a later version of the format; return what names it."""
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 7}))
    return "version 7 of the format"


@pytest.mark.faults
@pytest.mark.timeout(280)
@pytest.mark.parametrize("damage", [cut, flip, remove, renew])
def test_the_newest_is_damaged(
    damage: Callable[[Path], str], finished: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost
) -> None:
    run, options = Path(shutil.copytree(finished[0], tmp_path / "r")), finished[1]
    named = damage(checkpoint_path(run, 8))
    files = {path: path.read_bytes() for path in checkpoint_path(run, 8).rglob("*") if path.is_file()}
    text = train_on(2, [*options, f"--run.root={tmp_path}", "--resume=auto", "--checkpoint.keep=2"])
    warning = next(line for line in text.splitlines() if "skipping: " in line)
    assert "step-00000008" in warning
    assert named in warning
    assert f"resumed from {checkpoint_path(run, 6)} (step 6)" in text
    assert read_losses(run) == read_losses(finished[0])
    assert list_steps(run) == [6, 8]
    for step in (6, 8):
        checkpoints.verify(checkpoint_path(run, step))
    if damage is renew:  # of a version that can read it, it is a good one
        aside = checkpoint_path(run, 8).with_name("step-00000008-version-7")
        assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == {
            path.relative_to(checkpoint_path(run, 8)): content for path, content in files.items()
        }
    record_cost(f"newest checkpoint: {damage.__name__}", None, 2)


@pytest.mark.faults
@pytest.mark.timeout(280)
def test_all_but_one_are_damaged(finished: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost) -> None:
    """The intact one stays, though it is the oldest and only one is to be kept, until there are newer ones."""
    run, options = Path(shutil.copytree(finished[0], tmp_path / "r")), finished[1]
    named = {step: damage(checkpoint_path(run, step)) for step, damage in ((4, flip), (6, remove), (8, renew))}
    options = [*options, f"--run.root={tmp_path}", "--resume=auto", "--checkpoint.keep=1"]
    text = train_on(2, [*options, "--train.steps=3", "--checkpoint.every=1"])
    warnings = [line for line in text.splitlines() if line.startswith("skipping: ")]
    for step, name in named.items():
        assert sum(f"step-{step:08d}" in line and name in line for line in warnings) == 1, "once, not at every save"
    assert f"resumed from {checkpoint_path(run, 2)} (step 2)" in text
    for step in (2, 3):
        checkpoints.verify(checkpoint_path(run, step))
    assert checkpoint_path(run, 8).is_dir(), "a version that can read it may come back"
    train_on(2, options)
    assert read_losses(run) == read_losses(finished[0])
    record_cost("all checkpoints but the oldest damaged", None, 6)
