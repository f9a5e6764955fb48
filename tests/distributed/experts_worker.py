"""Train a model with experts on one engine after another, and resume each; runs on every rank."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rdt.checkpoint import BUFFERS
from megatron_rdt.config import load_config
from tests.distributed.every_choice_worker import read_losses, train_run


def train_experts(config_file: Path, engines: Sequence[str], source: Path | None = None) -> dict[str, dict[int, float]]:
    """Losses of a run on each engine, which is also resumed in its middle; with `source`, of a run resumed from that."""
    found = {}
    for engine in engines:
        name, changed = engine, {"parallel.engine": engine}
        if source is not None:
            there = train_run(load_config(config_file, {**changed, "run.name": f"{name}-converted"}), source)
            found[engine] = read_losses(there)
            continue
        straight = train_run(load_config(config_file, {**changed, "run.name": name}), None)
        middle = straight / "checkpoints" / "step-00000002"
        resumed = train_run(load_config(config_file, {**changed, "run.name": f"{name}-resumed"}), middle)
        files = [there / "checkpoints" / "step-00000004" / BUFFERS for there in (straight, resumed)]
        buffers = [torch.load(file, weights_only=True) for file in files]
        assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])
        found[engine] = read_losses(straight)
        assert read_losses(resumed) == {step: found[engine][step] for step in (3, 4)}, engine
    return found
