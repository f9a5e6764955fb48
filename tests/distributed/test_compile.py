"""Compiled layers under DDP, FSDP2, tensor and context parallelism give one process's loss and gradients, from a few graphs."""

import pytest

from tests.distributed.compile_worker import ENGINES, check_engines
from tests.distributed.processes import run_on_processes


@pytest.mark.distributed
@pytest.mark.timeout(290)
def test_compiled_layers_equal_one_process() -> None:
    verdict = run_on_processes(check_engines, 2, timeout=280)[0]
    assert set(verdict) == set(ENGINES)
    for name, found in verdict.items():
        assert found["worst"] < 3e-5, name
        assert found["graphs"] <= 10, (
            "four each for an iteration and for a layer that is alone or a unit of FSDP2; the loss"
        )
        assert found["breaks"] == 0
