"""Planned memory against the measured peak of a step, in one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rdt.config import DepthConfig, ModelConfig, RunConfig, TrainConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.measure import measure_steps, watch_allocations
from megatron_rdt.planner.memory import StepDepth, step_memory

pytestmark = pytest.mark.slow

MODEL = ModelConfig(vocab_size=1024, dim=128, ffn_dim=256)
WIDE: dict[str, Any] = {"dim": 256, "ffn_dim": 1024}
# Model, precision, checkpointing, k, micro-batches, tokens per sequence; in some activations dominate, in some weights.
CASES: list[tuple[dict[str, Any], str, Any, Any, int, int]] = [
    ({}, "float32", "none", "all", 1, 128),
    ({}, "bfloat16", "per_iteration", "all", 1, 128),
    ({"attention": "mla"}, "bfloat16", "none", 2, 2, 128),
    (WIDE | {"core_ffn": "moe"}, "float32", "none", "all", 2, 16),
    (WIDE | {"core_ffn": "moe", "experts": 4}, "bfloat16", "per_layer", "all", 1, 64),
    ({}, "float32", "selective", "all", 1, 128),
    ({}, "bfloat16", 4, "all", 1, 128),
    (WIDE | {"tie_embeddings": False, "vocab_size": 8192}, "bfloat16", "none", "all", 1, 32),
]


@pytest.mark.parametrize(("model", "precision", "checkpoint", "k", "number", "length"), CASES)
def test_planned_memory_is_within_a_tenth_of_the_measured(
    model: dict[str, Any], precision: str, checkpoint: Any, k: Any, number: int, length: int
) -> None:
    config = RunConfig(
        model=replace(MODEL, **model),
        depth=DepthConfig(checkpoint=checkpoint, backprop=k),  # type: ignore[arg-type]
        train=TrainConfig(
            micro_batch=2,
            global_batch=2 * number,
            sequence_length=length,
            precision=precision,
            device="cpu",  # type: ignore[arg-type]
        ),
    )
    for measured in measure_steps(config, torch.device("cpu"), (1, 8)):
        depth = StepDepth(measured.loops, measured.loops if k == "all" else min(k, measured.loops))
        planned = step_memory(config, Layout(), False, depth)
        print(
            f"T = {measured.loops}: {measured.peak / 1e6:.1f} MB, planned {planned.peak / 1e6:.1f} MB, {planned.moment}"
        )
        assert planned.peak == pytest.approx(measured.peak, rel=0.1)
        assert sum(planned.parts.values()) == pytest.approx(planned.peak)
        assert measured.sent == {}


def test_the_watch_sees_every_allocation_and_every_free() -> None:
    with watch_allocations(torch.device("cpu")) as allocations:
        kept = torch.empty(1_000_000)
        with allocations.window("one after the other"):
            for _ in range(3):
                torch.empty(2_000_000)
        with allocations.window("at once"):
            pair = [torch.empty(2_000_000) for _ in range(2)]
        del kept, pair
    assert allocations.peaks["one after the other"] == pytest.approx(12e6, rel=0.01)
    assert allocations.peaks["at once"] == pytest.approx(20e6, rel=0.01)


def test_a_ledger_remembers_its_peak_and_the_parts_of_it() -> None:
    ledger = Ledger()
    ledger.hold("weights", 5)
    ledger.note_peak("early", working_memory=3)
    ledger.hold("gradients", 2)
    ledger.note_peak("late")
    ledger.free("gradients")
    assert (ledger.peak, ledger.moment, ledger.total) == (8, "early", 5)
    assert ledger.at_peak == {"weights": 5, "working memory": 3}
