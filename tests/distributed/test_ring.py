"""The loop ring equals one process: losses, norm and every gradient; its checkpoints load without it and the other way."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.planner_worker import EVEN, compare_collectives
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
            ({"core_ring": 2}, "experts"),
            ({"core_ring": 2, "reshard_after_forward": False}, "hyper"),
            ({"core_ring": 2, "replicate": 2}, "residual"),
        ],
    ),
    "split stages": (
        4,
        [
            ({"core_ring": 2, "tensor": 2}, "hyper"),
            ({"core_ring": 2, "context": 2, "reduce": "per_micro_batch"}, "values"),
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
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_ring_in_bfloat16_is_as_close_as_rounding_allows(tensor: int) -> None:
    """Stages are sharded, and gathered in bfloat16, or split."""
    parallel = {"core_ring": 2, "tensor": tensor}
    differences, *_ = run_on_processes(compare_bfloat16, 4, parallel, 4, timeout=90)
    assert differences["loss objective"] < 1e-3
    assert not {name: value for name, value in differences.items() if not value < 0.1}


@pytest.mark.distributed
@pytest.mark.timeout(100)
def test_split_stages_send_what_is_planned() -> None:
    """Calls and bytes of every kind; `test_planner.py` has the other rings, on two processes."""
    found, *_ = run_on_processes(
        compare_collectives, 4, EVEN, {"core_ring": 2, "tensor": 2}, "per_iteration", timeout=90
    )
    for each in found.values():
        assert each["planned"] == each["counted"]
        assert each["counted"]["forward send"][0] > 0


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
