"""ZeRO with offload and with keys of `parallel.deepspeed` equals one process, resumes exactly and survives a bad step."""

from pathlib import Path

import pytest

from tests.distributed.deepspeed_worker import check_cases
from tests.distributed.processes import run_on_processes

OFFLOADED = ("zero1", "zero2", "zero3", "zero3 parameters")


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_offload_and_own_keys_equal_one_process(tmp_path: Path) -> None:
    verdict = run_on_processes(check_cases, 2, tmp_path, timeout=230)[0]
    assert set(verdict) == {"plain", "keys", *OFFLOADED}
    for name, found in verdict.items():
        assert found["gradient"] < 3e-4, name
        assert found["norm"] < 1e-5, name
        assert found["weights"] < 1e-3, name
        assert found["norm is finite"] is False, name
        assert found["weights kept"], name
        assert found["evaluated"] < 1e-5, name
        assert found["resumed exactly"], name
        assert found["rolled back exactly"], name
        assert found["optimizer"] == "torch.optim.adamw", name
    for name in OFFLOADED:
        assert verdict[name]["resumed without offload"] < 1e-5, name
    assert verdict["plain"]["resumed with offload"] < 1e-5
    # The user's bucket size is the one that DeepSpeed reduces with.
    assert verdict["keys"]["bucket"] == 700
    assert verdict["keys"]["collectives"] > 10 * verdict["plain"]["collectives"]
