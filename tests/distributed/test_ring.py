"""The loop ring equals one process: losses, norm and every gradient; its checkpoints load without it and the other way."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_on_processes
from tests.distributed.ring_worker import (
    MODELS,
    ask_for_hidden_states,
    compare_all,
    compare_bfloat16,
    exchange_checkpoints,
)

CASES: dict[str, tuple[int, list[tuple[dict[str, Any], str]]]] = {
    "two stages": (2, [({"core_ring": 2}, "diagonal"), ({"core_ring": 2, "reduce": "per_micro_batch"}, "linear")]),
    "four stages": (4, [({"core_ring": 4}, name) for name in MODELS]),
    "sharded stages": (
        4,
        [
            ({"core_ring": 2}, "add"),
            ({"core_ring": 2, "reshard_after_forward": False}, "hyper"),
            ({"core_ring": 2, "replicate": 2}, "residual"),
        ],
    ),
}


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("group", CASES)
def test_a_ring_equals_one_process(group: str) -> None:
    """With drawn T, truncation, accumulation, every kind of checkpointing, loss masks, over steps of AdamW."""
    processes, cases = CASES[group]
    verdict, *_ = run_on_processes(compare_all, processes, cases, processes, timeout=190)
    assert len(verdict) == len(cases)
    for name, differences in verdict.items():
        assert len(differences) > 60
        assert not {what: value for what, value in differences.items() if not value < 1e-10}, name


@pytest.mark.distributed
@pytest.mark.timeout(100)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_ring_in_bfloat16_is_as_close_as_rounding_allows(processes: int) -> None:
    """On four processes stages are sharded, and gathered in bfloat16."""
    differences, *_ = run_on_processes(compare_bfloat16, processes, {"core_ring": 2}, processes, timeout=90)
    assert differences["loss objective"] < 1e-3
    assert not {name: value for name, value in differences.items() if not value < 0.1}


@pytest.mark.distributed
@pytest.mark.timeout(100)
def test_checkpoints_load_with_and_without_a_ring(tmp_path: Path) -> None:
    """Weights and moments of every stage are the same bits, and the next step has the same loss."""
    assert run_on_processes(exchange_checkpoints, 4, tmp_path, 4, 4, timeout=90) == [[]] * 4


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_hidden_states_are_refused_with_a_sentence() -> None:
    for error in run_on_processes(ask_for_hidden_states, 2, {"core_ring": 2}, 2, timeout=50):
        assert "some of the core's layers only (parallel.core_ring)" in error
