"""Runs on every rank: trains a model with experts on one engine after the other, resumes each."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rdt.checkpoint import BUFFERS
from megatron_rdt.config import load_config
from tests.distributed.parts_worker import losses, run


def train_experts(config_file: Path, engines: Sequence[str], source: Path | None = None) -> dict[str, dict[int, float]]:
    """Losses of a run on each engine, which is also resumed in its middle; or of one that goes on from `source`."""
    found = {}
    for engine in engines:
        name, changed = engine, {"parallel.engine": engine}
        if source is not None:
            there = run(load_config(config_file, {**changed, "run.name": f"{name}-converted"}), source)
            found[engine] = losses(there)
            continue
        straight = run(load_config(config_file, {**changed, "run.name": name}), None)
        middle = straight / "checkpoints" / "step-00000002"
        resumed = run(load_config(config_file, {**changed, "run.name": f"{name}-resumed"}), middle)
        files = [there / "checkpoints" / "step-00000004" / BUFFERS for there in (straight, resumed)]
        buffers = [torch.load(file, weights_only=True) for file in files]
        assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])
        found[engine] = losses(straight)
        assert losses(resumed) == {step: found[engine][step] for step in (3, 4)}, engine
    return found
