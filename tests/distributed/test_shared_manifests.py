"""One rank asks the file system about shards for all that share it; machines with copies ask about theirs."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_rdt.config import RunConfig
from megatron_rdt.data import CorpusManifest, IndexedDataset
from megatron_rdt.data.packing_plan import PackingPlan
from megatron_rdt.errors import DataError
from megatron_rdt.object_collectives import work_while_others_wait
from megatron_rdt.parallel.process_group import limit_collectives
from megatron_rdt.train.data.prepared import open_prepared_data
from tests.data.corpora import draw_documents, write_corpus
from tests.distributed.processes import run_on_processes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
SHARDS = 12
RANKS = 3


@pytest.fixture
def many_shards(tiny_corpus: Path, tmp_path: Path) -> Path:
    """A corpus in `first/corpus` with SHARDS training shards and one for validation."""
    draw = np.random.default_rng(7)
    *train, valid = (
        [document for document in draw_documents(draw, tokens) if len(document) > 1]  # with a target, for pack: example
        for tokens in [*[300] * SHARDS, 900]
    )
    return write_corpus(tmp_path / "first" / "corpus", tiny_corpus, train, [valid])


def count_calls(counts: dict[str, int], owner: type, name: str, label: str) -> None:
    """Count the calls of a method in `counts`, under `label`."""
    original: Callable[..., Any] = getattr(owner, name)

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        counts[label] = counts.get(label, 0) + 1
        return original(self, *arguments, **named)

    setattr(owner, name, counted)


def open_on_ranks(config: RunConfig, directories: list[str]) -> tuple[dict[str, int], list[str], list[int], str]:
    """Open the data, each rank in its directory: calls, levels of verification, first training sample, error."""
    rank = dist.get_rank()
    os.chdir(directories[rank])
    counts: dict[str, int] = {}
    levels: list[str] = []
    verify = CorpusManifest.verify
    CorpusManifest.verify = lambda self, level="size": (levels.append(level), verify(self, level))[1]  # type: ignore[method-assign, assignment, func-returns-value]
    count_calls(counts, IndexedDataset, "__init__", "shards opened")
    count_calls(counts, PackingPlan, "verify", "plans hashed")
    # The first two directories are those of one machine if they are the same.
    local_rank = directories[:rank].count(directories[rank])
    try:
        data = open_prepared_data(config, RANKS, rank, local_rank)
    except DataError as error:
        return counts, levels, [], str(error)
    assert data.validation["corpus"].count == 6
    targets = data.validation["corpus"].targets
    return counts, levels, [*data.mixture.read_samples([0]).tokens[0, :4].tolist(), targets], ""


def set_up(configure: Callable[..., RunConfig], *options: str) -> RunConfig:
    return configure("--data.path=corpus", "--eval.sequences=6", "--data.verify=full", *options)


@pytest.mark.parametrize("pack", ["chunk", "bestfit", "example"])
def test_one_rank_asks_about_the_shards_of_a_shared_file_system(
    pack: str, many_shards: Path, configure: Callable[..., RunConfig]
) -> None:
    config = set_up(configure, f"--data.pack={pack}", "--train.sequence_length=128")
    results = run_on_processes(open_on_ranks, RANKS, config, [str(many_shards.parent)] * RANKS, timeout=100)
    assert [levels for _, levels, _, _ in results] == [["full"], [], []]
    assert [error for *_, error in results] == [""] * RANKS
    assert results[0][0]["shards opened"] >= SHARDS
    for counts, *_ in results[1:]:
        assert counts["shards opened"] <= 5, "those that it reads: for BOS, its windows and a sample"
        assert "plans hashed" not in counts
    assert results[0][2] == results[1][2] == results[2][2]
    assert pack == "example" or results[0][2][-1] == 6 * 128


def test_machines_with_copies_check_their_own(many_shards: Path, configure: Callable[..., RunConfig]) -> None:
    """Ranks 1 and 2 are on a second machine: the first of them reads every byte there."""
    other = many_shards.parent.parent / "second"
    shutil.copytree(many_shards.parent, other)
    first, second = str(many_shards.parent), str(other)
    config = set_up(configure, "--data.pack=bestfit")
    results = run_on_processes(open_on_ranks, RANKS, config, [first, second, second], timeout=100)
    assert [levels for _, levels, _, _ in results] == [["full"], ["full"], ["size"]]
    assert [error for *_, error in results] == [""] * RANKS
    assert all(counts["shards opened"] >= SHARDS for counts, *_ in results)
    assert results[0][2] == results[1][2] == results[2][2]
    for folder in (many_shards, other / "corpus"):
        assert len(list(folder.glob("packing/L32/train/*.pack"))) == SHARDS


@pytest.mark.parametrize("fault", ["gone", "cut", "another"])
def test_a_fault_of_a_copy_is_the_error_of_all(
    fault: str, many_shards: Path, configure: Callable[..., RunConfig]
) -> None:
    other = many_shards.parent.parent / "second"
    shutil.copytree(many_shards.parent, other)
    manifest, shard = other / "corpus" / "manifest.json", other / "corpus" / "train" / "shard-00003.bin"
    if fault == "gone":
        manifest.unlink()
    elif fault == "cut":
        shard.write_bytes(shard.read_bytes()[:-2])
    else:
        document = json.loads(manifest.read_text())
        document["splits"]["train"]["shards"][3]["bin_sha256"] = "0" * 64
        manifest.write_text(json.dumps(document))
    first = str(many_shards.parent)
    config = configure("--data.path=corpus", "--eval.sequences=6")
    results = run_on_processes(open_on_ranks, RANKS, config, [first, str(other), first], timeout=100)
    expected = {"gone": "manifest.json does not exist", "cut": "shard-00003.bin has", "another": "rank 1 reads another"}
    assert len({error for *_, error in results}) == 1
    assert expected[fault] in results[2][3]


def work_for_long(fails: bool) -> tuple[Any, str]:
    """Work on ranks 0 and 2 for longer than a collective may take, and fail on the second of them."""
    limit_collectives(2.0)

    def work() -> int:
        time.sleep(3.5)
        if fails and dist.get_rank() == 2:
            raise DataError("the disk is full")
        return 7 + dist.get_rank()

    try:
        return work_while_others_wait(work if dist.get_rank() != 1 else None), ""
    except DataError as error:
        return None, str(error)
    finally:
        limit_collectives(60)  # on a busy machine the ranks meet again later than after the short limit


def test_work_may_take_longer_than_a_collective() -> None:
    assert run_on_processes(work_for_long, RANKS, False, timeout=60) == [(7, ""), (None, ""), (9, "")]
    assert run_on_processes(work_for_long, RANKS, True, timeout=60) == [(None, "the disk is full")] * RANKS
