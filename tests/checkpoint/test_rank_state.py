"""State of one rank: its random generators."""

import random
from pathlib import Path

import numpy as np
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.rank_state import restore_rank_rng
from tests.checkpoint.runs import Configure
from tests.checkpoint.save_worker import make_engine_with_model


def test_random_generators_are_restored(run: Path, configure: Configure, tmp_path: Path) -> None:
    engine = make_engine_with_model(configure())

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]

    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)
    draw()  # an odd number of normal draws leaves a second one waiting in each generator
    directory = checkpoints.stage_checkpoint(engine, tmp_path, "{}", {"step": 1}, {}, None, 0)()
    expected = [draw(), draw()]
    restore_rank_rng(directory, 0)
    assert [draw(), draw()] == expected
    restore_rank_rng(directory, 3)  # a rank that the saving run did not have keeps its own
    assert draw() not in expected
