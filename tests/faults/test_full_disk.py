"""A disk that is full or read-only when a checkpoint is due: the run stops, or goes on and saves later, as configured."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from tests.checkpoint.runs import checkpoint_path, list_all_names, list_steps, read_losses
from tests.distributed.training import start_training, train_on, wait_for_lines
from tests.faults.conftest import RecordCost

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

LARGE = 1 << 28
STEPS, EVERY = 60, 2  # many are left when there is room again
POLL_S = 0.01


class SmallDisk:
    """A file system in memory, mounted at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remount(self, options: str) -> None:
        """Change options; a file that is open for writing keeps a disk from becoming read-only for a moment."""
        for _ in range(500):
            if not subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=False).returncode:
                return
            time.sleep(POLL_S)
        raise TimeoutError(f"{self.path} could not be remounted with {options}")

    def set_size(self, size: int) -> None:
        """Change the size in bytes."""
        self.remount(f"size={size}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of its own for a run."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> tuple[Path, list[str]]:
    """A run that was left alone, and options of the same one: every second step is saved, and all checkpoints are kept."""
    options = [*tiny_options, f"--train.steps={STEPS}", f"--checkpoint.every={EVERY}", "--checkpoint.keep=0"]
    options += ["--eval.every=0", "--logging.every=1", "--run.name=r"]
    root = tmp_path_factory.mktemp("straight")
    train_on(2, [*options, f"--run.root={root}", "--parallel.engine=fsdp"])
    return root / "r", [*options, "--resume=auto"]


def measure_pages(folder: Path) -> int:
    """Bytes that the files of a folder take on a disk in memory."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def check_saved(run: Path, steps: list[int]) -> None:
    """Check that a run has intact checkpoints of these steps, and nothing of a save that failed."""
    assert list_all_names(run) == [f"step-{step:08d}" for step in steps]
    for step in steps:
        checkpoints.verify(checkpoint_path(run, step))


def test_a_full_disk_stops_the_run(straight: tuple[Path, list[str]], disk: SmallDisk, record_cost: RecordCost) -> None:
    whole, options = straight
    options = [*options, f"--run.root={disk.path}", "--parallel.engine=fsdp"]
    taken = measure_pages(checkpoint_path(whole, EVERY))
    disk.set_size(int(3.5 * taken))
    with start_training(options, 2) as ranks:
        assert ranks.wait(120) == [1, 1], ranks.format_report()
        messages = [ranks.read_output(rank) for rank in range(2)]
    run = disk.path / "r"
    check_saved(run, [2, 4, 6])
    for message in messages:
        assert re.search(
            rf"could not save {checkpoint_path(run, 8)}: rank [01]: the disk is full \([\d.]+ MiB free\)", message
        )
        assert "Earlier checkpoints are untouched." in message
        needed = re.search(r"Free space \(a checkpoint takes about (\d+)kB\)", message)
        assert needed, message
        assert 0.5 < int(needed[1]) * 1000 / taken < 2
    disk.set_size(LARGE)
    text = train_on(2, options)
    assert f"resumed from {checkpoint_path(run, 6)}" in text
    assert read_losses(run) == read_losses(whole)
    record_cost("full disk, checkpoint.on_failure stop", None, 8 - 6)


@pytest.mark.parametrize(("engine", "asynchronous"), [("fsdp", "false"), ("fsdp", "true"), ("zero2", "false")])
def test_a_run_goes_on_without_room_to_save(
    engine: str, asynchronous: str, straight: tuple[Path, list[str]], disk: SmallDisk, record_cost: RecordCost
) -> None:
    """Not even records can be written; when there is room again, all of them are, and checkpoints are saved."""
    whole, options = straight
    options = [*options, f"--run.root={disk.path}", f"--parallel.engine={engine}", "--checkpoint.on_failure=continue"]
    options += [f"--checkpoint.asynchronous={asynchronous}"]
    disk.set_size(int(3.5 * measure_pages(checkpoint_path(whole, EVERY))))
    with start_training(options, 2) as ranks:
        wait_for_lines(ranks, "warning: could not save", 2)
        failed = [int(step) for step in re.findall(r"step (\d+): warning: could not save", ranks.read_output(0))]
        disk.set_size(LARGE)
        assert ranks.wait(120) == [0, 0], ranks.format_report()
        text = ranks.read_output(0)
    run = disk.path / "r"
    assert f"Training goes on, as checkpoint.on_failure says; the newest is step-{failed[0] - EVERY:08d}" in text
    check_saved(
        run, [step for step in range(EVERY, STEPS + 1, EVERY) if f"step {step}: warning: could not" not in text]
    )
    assert list_steps(run)[-1] == STEPS
    losses, expected = read_losses(run), read_losses(whole)
    assert list(losses) == list(range(1, STEPS + 1)), "every record, though the disk was full"
    assert losses == (expected if engine == "fsdp" else pytest.approx(expected, rel=1e-4))
    record_cost(f"full disk, checkpoint.on_failure continue, {engine}, asynchronous {asynchronous}", None, 0)


def test_the_last_checkpoint_has_to_be_written(straight: tuple[Path, list[str]], disk: SmallDisk) -> None:
    whole, options = straight
    options = [*options, f"--run.root={disk.path}", "--parallel.engine=fsdp", "--checkpoint.on_failure=continue"]
    disk.set_size(int(1.5 * measure_pages(checkpoint_path(whole, EVERY))))
    with start_training([*options, "--train.steps=6"], 2) as ranks:
        assert ranks.wait(120) == [1, 1], ranks.format_report()
        text = ranks.read_output(0)
    run = disk.path / "r"
    assert "step 4: warning: could not save" in text
    assert re.search(rf"error.*could not save {checkpoint_path(run, 6)}", text)
    check_saved(run, [2])


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_disk_that_becomes_read_only(
    on_failure: str, straight: tuple[Path, list[str]], disk: SmallDisk, tmp_path: Path, record_cost: RecordCost
) -> None:
    """Only checkpoints are on it."""
    whole, options = straight
    run = tmp_path / "r"
    run.mkdir()
    (run / "checkpoints").symlink_to(disk.path)
    options = [*options, f"--run.root={tmp_path}", "--parallel.engine=fsdp", f"--checkpoint.on_failure={on_failure}"]
    with start_training(options, 2) as ranks:
        wait_for_lines(ranks, ": saved ", 1)
        disk.remount("ro")
        if on_failure == "continue":
            wait_for_lines(ranks, "warning: could not save", 1)
            disk.remount("rw")
        assert ranks.wait(120) == [int(on_failure == "stop")] * 2, ranks.format_report()
        text = ranks.read_output(0)
    failed = [int(step) for step in re.findall(r"could not save \S+step-(\d+): rank 0: .*Read-only file system", text)]
    assert failed
    assert f"Make {run / 'checkpoints'} writable" in text
    disk.remount("rw")
    check_saved(run, [step for step in list_steps(run) if step not in failed])
    assert list_steps(run)[-1] == (STEPS if on_failure == "continue" else failed[0] - EVERY)
    train_on(2, options)
    assert read_losses(run) == read_losses(whole)
    record_cost(f"read-only disk, checkpoint.on_failure {on_failure}", None, 0 if on_failure == "continue" else EVERY)
