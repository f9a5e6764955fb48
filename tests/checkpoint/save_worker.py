"""Save a checkpoint again and again, killed at a later moment each time; check the files left over; print a verdict.

A child process is forked for every moment. A moment is a change to the file system (a file opened for writing, a
directory made, something renamed or removed), as Python's audit events report them.
"""

import gc
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import ModelConfig, RunConfig, TrainConfig, dump_config
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, make_engine

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
KEEP = 2


def is_change(event: str, arguments: tuple) -> bool:
    """Return True if an audit event is a change to the file system."""
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


class Killer:
    """Counts changes, and kills this process just before number `at`."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if is_change(event, arguments):
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def make_engine_with_model(config: RunConfig) -> Engine:
    """An engine on the CPU with the model of `config`."""
    engine = make_engine(config, torch.device("cpu"))
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    engine.setup(model)
    return engine


def save(engine: Engine, run: Path, step: int, parent: int | None) -> None:
    """Save a checkpoint of `step` that descends from `parent`."""
    facts = {"parent": f"step-{parent:08d}" if parent else None}
    config = dump_config(engine.config)
    checkpoints.stage_checkpoint(engine, run, config, {"step": step}, facts, run.parent / "tokenizer", KEEP)()


def check_after_kill(engine: Engine, run: Path, before: int, step: int) -> str:
    """Check the run after a killed save of `step` that continued from `before`; return the name of its newest checkpoint."""
    newest = checkpoints.newest_checkpoint(run)
    assert newest is not None
    assert newest.name in (f"step-{before:08d}", f"step-{step:08d}"), newest
    for directory in (run / "checkpoints").glob("step-*"):
        checkpoints.verify(directory)
    on = int(newest.name.removeprefix("step-"))
    save(engine, run, step + 1, on)
    assert (run / "latest").read_text() == f"step-{step + 1:08d}\n"
    assert checkpoints.newest_checkpoint(run) == run / "checkpoints" / f"step-{step + 1:08d}"
    left = [path.name for path in (run / "checkpoints").iterdir()]
    assert len(left) == KEEP, left
    assert all(name.startswith("step-") for name in left), left
    return newest.name


def kill_at_every_moment(engine: Engine, base: Path, before: int, step: int, first: int = 0) -> dict[str, int]:
    """Kill a save of `step` in copies of `base` that continue from checkpoint `before`, at every moment from `first` on."""
    outcomes: dict[str, int] = {}
    for at in range(first, 10_000):
        run = base.with_name(f"{base.name}-{step}-{at}")
        shutil.copytree(base, run)
        child = os.fork()
        if child == 0:
            Killer(at)
            save(engine, run, step, before)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        name = check_after_kill(engine, run, before, step)
        outcomes[name] = outcomes.get(name, 0) + 1
        shutil.rmtree(run)
    return outcomes


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.model").write_text("anything")
    model = ModelConfig(vocab_size=31, dim=16, core_layers=1, heads=2, kv_heads=2)
    engine = make_engine_with_model(RunConfig(model=model, train=TrainConfig(device="cpu")))
    base = root / "base"
    for step in (1, 2, 3):
        save(engine, base, step, step - 1 or None)
    gc.freeze()  # no child traverses these objects, which would copy their pages
    verdict = {
        "next step": kill_at_every_moment(engine, base, 3, 4),
        # Up to the renames this is the same as above.
        "step of another branch": kill_at_every_moment(engine, base, 2, 3, first=18),
    }
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
