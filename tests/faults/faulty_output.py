"""Training on ranks whose outputs fail, or whose clock jumps, after a number of steps."""

import errno
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_rdt.train import displays
from megatron_rdt.train.trainer import Trainer
from tests.distributed.training import run_pretrain

AFTER = 1  # steps of this process
FULL = Path("/dev/full")


def fill_disk_of_tensorboard(trainer: Trainer) -> None:
    """Let every write of event files fail as on a full disk."""
    from tensorboard.summary.writer import record_writer

    def refuse(self: Any, data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record_writer.RecordWriter.write = refuse


def fill_disk_of_console(trainer: Trainer) -> None:
    """Direct standard output to a device that is always full."""
    os.dup2(os.open(FULL, os.O_WRONLY), 1)


def close_console(trainer: Trainer) -> None:
    """Direct standard output to a pipe that nobody reads, as when a pager or the terminal has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def fill_disk_of_records(trainer: Trainer) -> None:
    """Put a device that is always full in place of the file of records, as it is open."""
    if trainer.recorder is not None:
        path = trainer.run_directory / "metrics.jsonl"
        path.rename(path.with_name("metrics.before"))
        path.symlink_to(FULL)


def break_wandb(trainer: Trainer) -> None:
    """Let the program of Weights & Biases fail."""

    def refuse(*_: Any) -> NoReturn:
        raise ConnectionError("the server is gone")

    displays.WeightsAndBiases.show_numbers = refuse  # type: ignore[method-assign]


def jump_clock(trainer: Trainer) -> None:
    """Set this process's clock back by a day on rank 0, ahead by a day on the others, and another time zone."""
    ahead = 86400.0 if trainer.engine.rank else -86400.0
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + ahead
    time.time_ns = lambda: clock_ns() + int(ahead * 1e9)
    os.environ["TZ"] = "Pacific/Kiritimati" if trainer.engine.rank else "Pacific/Pago_Pago"
    time.tzset()


def install_wandb() -> None:
    """Put a package in place of wandb that does nothing."""
    nothing = types.SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda: None, log=lambda _: None)
    package = types.ModuleType("wandb")
    vars(package).update(init=lambda **_: nothing, Settings=dict, Html=str)
    package.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    sys.modules["wandb"] = package


def train_with_fault(words: Sequence[str], fault: Callable[[Trainer], None]) -> NoReturn:
    """Run the training script; the fault comes after some steps, on each rank."""
    run_due_actions = Trainer._run_due_actions

    def act(self: Trainer) -> None:
        run_due_actions(self)
        if self.step - self.first_step == AFTER:
            fault(self)

    Trainer._run_due_actions = act  # type: ignore[method-assign]
    if fault is break_wandb:
        install_wandb()
    run_pretrain(words)
