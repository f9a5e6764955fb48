"""Saves by several ranks: each shard is written once, by one that holds it, without asking the others."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_on_processes
from tests.distributed.saving_worker import exchange_messages, save_twice

ARRANGEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"engine": "ddp"}, "plain"),
    ({"engine": "fsdp"}, "plain"),
    ({"engine": "fsdp", "replicate": 2}, "parts"),
    ({"engine": "fsdp", "tensor": 2}, "plain"),
    ({"engine": "fsdp", "tensor": 2, "replicate": 2}, "plain"),
    ({"engine": "fsdp", "expert": 2}, "experts"),
    ({"engine": "fsdp", "expert": 2, "tensor": 2}, "experts"),
    ({"engine": "fsdp", "context": 2}, "mla"),
    ({"engine": "fsdp", "core_ring": 2}, "plain"),
    ({"engine": "fsdp", "core_ring": 2, "replicate": 2}, "plain"),
]


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("options", "model"), ARRANGEMENTS, ids=str)
def test_every_shard_is_written_once(options: dict[str, Any], model: str, tmp_path: Path) -> None:
    found = run_on_processes(save_twice, 4, tmp_path, options, model, timeout=170)
    first = found[0]
    assert first["tensors"] > 30
    assert (first["wrong"], first["missing"]) == ([], [])
    names = [name for of_rank in found for name in of_rank["second"]]
    assert len(names) == len(set(names))
    written = {
        str(path.relative_to(tmp_path / "second")) for path in (tmp_path / "second").rglob("*") if path.is_file()
    }
    assert written == {*names, "model/.metadata", "optimizer/.metadata"}
    for of_rank in found:
        assert of_rank["first sends"] == [True, True]
        assert of_rank["second sends"] == [False, False]
        assert of_rank["first"] == of_rank["second"]
    assert [*first["first metadata"].values()] == [*first["second metadata"].values()]
    # No rank writes much more than its share, though several hold the same.
    sizes = [sum(of_rank["second"].values()) for of_rank in found]
    assert max(sizes) < 1.5 * sum(sizes) / len(sizes)


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_messages_reach_rank_0_and_come_back() -> None:
    first, *others = run_on_processes(exchange_messages, 3, timeout=50)
    for number in range(3):
        assert first[3 * number] == [{"rank": rank, "number": number} for rank in range(3)]
        for other in others:
            assert other[3 * number] is None
        for of_rank in (first, *others):
            assert of_rank[3 * number + 1 : 3 * number + 3] == [f"{number} of 0", number * 10]
    assert first[9] == "few keys"
    message, was_quick = first[10]
    assert message == "rank 1, 2 sent no message to rank 0 within"[:40]
    assert was_quick
