"""Two ranks save and start together, even if one of them fails to write or sees other files than the other."""

from pathlib import Path

import pytest

from tests.checkpoint.ranks_worker import find_starts, save_with_all_failures, spoil_weights
from tests.distributed.processes import run_on_processes

RANKS = (0, 1)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_failed_write_on_one_rank_stops_all_with_its_reason(tmp_path: Path) -> None:
    engines = ["zero1", "zero3", "fsdp"]
    found, other = run_on_processes(save_with_all_failures, 2, tmp_path, engines, timeout=110)
    assert found == other
    for engine in engines:
        for rank in RANKS:
            message = found[f"{engine} {rank}"]
            assert message.startswith(f"SaveError: could not save {tmp_path / engine}/checkpoints/step-00000002: ")
            assert (
                f"rank {rank}: a file would be larger than this process, or the file system, allows ([Errno 27]"
                in message
            )
            assert found[f"{engine} {rank} left"] == "step-00000001"
        if engine != "fsdp":
            assert "rank 0: the disk is full" in found[f"{engine} script"]
            assert found[f"{engine} script left"] == "step-00000001"
            assert found[f"{engine} versions"] == "python megatron_rdt torch deepspeed"
        assert found[f"{engine} at last"] == "step-00000001 step-00000002"


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_all_ranks_start_from_the_checkpoint_that_the_first_one_chooses(tmp_path: Path) -> None:
    found, other = run_on_processes(find_starts, 2, tmp_path, timeout=110)
    assert found == other
    run = tmp_path / "starts"
    last, before = str(run / "checkpoints" / "step-00000003"), str(run / "checkpoints" / "step-00000002")
    assert (found["none"], found["fresh"], found["good"], found["all good again"]) == ("None", "None", last, last)
    assert found["absent"].startswith(f"CheckpointError: {tmp_path / 'absent'} does not exist")
    assert (found["stale 0"], found["stale 1"]) == (before, last)
    assert found["unreadable 0"].startswith(f"CheckpointError: {run} cannot be searched for a checkpoint")
    assert found["unreadable 1"] == last
    for name in ("trainer.json", "config.yaml"):
        assert found[f"damaged {name}"] == before
        assert found[f"damaged {name}, named"].startswith(f"CheckpointError: {last} is damaged: {name} has other")
    assert found["all damaged"].startswith(f"CheckpointError: every checkpoint in {run / 'checkpoints'} is damaged")


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_weight_that_is_not_finite_on_one_rank_is_seen_by_all(tmp_path: Path) -> None:
    engines = ["ddp", "fsdp", "zero1", "zero3"]
    found, other = run_on_processes(spoil_weights, 2, tmp_path, engines, timeout=110)
    assert found == other == dict.fromkeys(engines, "True False")
