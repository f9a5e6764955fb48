"""A rank that is really delayed is named, with its host and the part of the work that takes it longer."""

import json
import socket
from pathlib import Path

import pytest

from tests.distributed.processes import start_ranks
from tests.distributed.stragglers_worker import DELAY_S, train_with_delay

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
OPTIONS = [
    "--eval.every=0",
    "--checkpoint.every=0",
    "--train.steps=6",
    "--logging.every=2",
    "--depth.scheme=fixed",
    "--depth.mean=3",
]


@pytest.mark.parametrize(
    ("engine", "processes", "place", "rank"),
    [("fsdp", 3, "core", 1), ("ddp", 2, "core", 1), ("zero3", 2, "core", 0), ("fsdp", 2, "read", 1)],
)
def test_the_delayed_rank_is_named(
    engine: str, processes: int, place: str, rank: int, tiny_options: list[str], tmp_path: Path
) -> None:
    batch = [f"--train.global_batch={processes}", "--logging.straggler_intervals=2"]
    options = [*tiny_options, *OPTIONS, *batch, f"--run.root={tmp_path}", f"--parallel.engine={engine}"]
    with start_ranks(train_with_delay, processes, options, place, rank, group=False) as ranks:
        assert ranks.wait(150) == [0] * processes, ranks.format_report()
        said = ranks.read_output(0)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "slowest_rank" in record] == [2, 4, 6]
    for record in records[3::2]:
        slowest = record["slowest_rank"]
        assert (slowest["rank"], slowest["host"]) == (rank, socket.gethostname())
        parts = {"read": slowest["read_s"], "prepare": slowest["prepare_s"], "core": slowest["core_s"]}
        assert max(parts, key=parts.__getitem__) == place, parts
        # The others wait for it in collectives, which is no work of theirs.
        assert slowest["own_s"] > slowest["median_s"] + DELAY_S
        assert slowest["ratio"] > 1.5
    warnings = [line for line in said.splitlines() if "times as long as the median" in line]
    assert len(warnings) == 1, said
    assert f"step 4: rank {rank} on {socket.gethostname()} takes" in warnings[0]
    assert said.count(f"slowest rank {rank} on") >= 2
