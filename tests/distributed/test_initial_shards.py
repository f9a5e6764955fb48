"""Each rank fills its own part of every parameter with the values that one process has there; a load needs none."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.parallel.zero_partitions import split_run
from tests.distributed.initial_shards_worker import DENSE, EXPERTS, compare_shards, load_over_nan
from tests.distributed.processes import run_on_processes

CASES: dict[int, list[tuple[ModelConfig, dict[str, Any]]]] = {
    4: [
        (DENSE, {}),
        (DENSE, {"replicate": 2}),
        (DENSE, {"context": 2}),
        (DENSE, {"tensor": 2}),
        (DENSE, {"tensor": 4}),
        (EXPERTS, {"expert": 2}),
    ],
    8: [
        (DENSE, {"tensor": 2}),  # 60 rows of the embedding: 30 of each half, 8, 8, 8 and 6 on its four ranks
        (EXPERTS, {}),  # more ranks than experts: each is split
        (EXPERTS, {"expert": 4, "tensor": 2}),
    ],
}


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", CASES)
def test_shards_are_those_of_one_process(world_size: int) -> None:
    verdicts = run_on_processes(compare_shards, world_size, CASES[world_size], timeout=190)
    for case, *ranks in zip(CASES[world_size], *verdicts, strict=True):
        wrong = [text for rank in ranks for text in rank if "differs" in text]
        assert not wrong, case
        is_strided = any("_StridedShard" in text for text in ranks[0])
        assert is_strided == ("tensor" in case[1]), case
    assert any("Shard(dim=1)" in text for text in verdicts[0][1 if world_size == 8 else 3])


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_checkpoint_brings_every_weight(tmp_path: Path) -> None:
    """A resumed run leaves its parameters unset until it loads them."""
    engines = ["ddp", "fsdp", "fsdp tensor", "zero1", "zero2", "zero3"]
    for verdict in run_on_processes(load_over_nan, 2, engines, tmp_path, timeout=190):
        assert verdict == dict.fromkeys(engines, True)


@pytest.mark.parametrize("shape", [(), (11,), (5, 3), (3, 4, 5), (2, 1, 3, 2)])
def test_a_run_of_a_flattened_tensor_is_cut_into_few_blocks(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            marks, blocks = torch.zeros(shape, dtype=torch.int64), list(split_run(whole, start, stop))
            assert len(blocks) <= max(1, 2 * len(shape) - 1)
            for values, offsets in blocks:
                place = tuple(slice(first, first + size) for first, size in zip(offsets, values.shape, strict=True))
                assert torch.equal(whole[place], values)
                marks[place] += 1
            assert marks.flatten().tolist() == [int(start <= i < stop) for i in range(whole.numel())]
