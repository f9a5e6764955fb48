"""A core in pieces that is rounded before its gathers gives the digits of one that is rounded after, from half the bytes."""

import pytest

from tests.distributed.processes import run_on_processes
from tests.distributed.rounded_gather_worker import Case, compare_compiled, compare_gathers, sum_rounded_gradients

PAIRS: list[Case] = [
    ("plain", {"core_gather": "per_layer"}),
    ("plain", {"core_gather": "per_iteration", "reshard_after_forward": False}),
    ("mla", {"core_gather": "per_layer", "reduce": "per_micro_batch"}),
    ("experts", {"core_gather": "per_layer"}),
    ("experts", {"core_gather": "per_iteration"}),
]
QUADS: list[Case] = [
    ("plain", {"core_gather": "per_layer", "tensor": 2}),
    ("mla", {"core_gather": "per_iteration", "tensor": 2, "context": 2}),
    ("experts", {"core_gather": "per_layer", "replicate": 2}),
    ("experts", {"core_gather": "per_layer", "expert": 2, "context": 2}),
    ("experts", {"core_gather": "per_layer", "expert": 2, "tensor": 2}),
]


@pytest.mark.distributed
@pytest.mark.timeout(290)
@pytest.mark.parametrize(("processes", "cases"), [(2, PAIRS), (4, QUADS)])
def test_rounding_before_the_gather_changes_nothing_but_its_bytes(processes: int, cases: list[Case]) -> None:
    """Losses, gradients and weights of four steps of different T, k and checkpointing are the same bit for bit."""
    for found in run_on_processes(compare_gathers, processes, cases, timeout=280):
        for case, each in zip(cases, found, strict=True):
            assert each["compared"] > 100, case
            assert each["differing"] == 0, case
            assert each["first loss"] == each["first loss, gathered once"], case
            # Of four steps with two micro-batches, in the forward pass alone 24 iterations.
            assert each["narrower"] >= (2 if case[1].get("reshard_after_forward") is False else 24), case
            assert each["kinds"] == ["all-gather"], case
            assert each["ratios"] == [2.0], case


@pytest.mark.distributed
@pytest.mark.timeout(290)
def test_compiled_layers_take_gathered_matrices() -> None:
    for found in run_on_processes(compare_compiled, 2, timeout=280):
        assert len(found) == 4
        for name, each in found.items():
            assert each["differing"] == 0, name
            assert each["breaks"] == 0, name
            assert each["graphs"] <= 12, name


def test_gradients_of_rounded_matrices_are_summed_in_float32() -> None:
    assert sum_rounded_gradients() < 1e-4
