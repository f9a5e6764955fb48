"""Opening prepared data: what every rank checks, and what local rank 0 does for the others."""

from pathlib import Path
from typing import Any

import pytest

from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.data import CorpusManifest, load_manifest
from megatron_rdt.data.packing_plan import make_plans, plan_path
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.train.data.prepared import open_prepared_data
from tests.train.runs import Configure


def test_too_little_to_evaluate_is_refused_at_the_start(configure: Configure) -> None:
    config = configure("--eval.sequences=4")
    assert len(open_prepared_data(config, 1).validation["tiny"]) == 4
    with pytest.raises(ConfigError, match=r"eval.sequences is 4, fewer than 5 data-parallel ranks"):
        open_prepared_data(config, 5)
    with pytest.raises(ConfigError, match=r"the validation split of .* has .* --eval.every 0"):
        open_prepared_data(config, 1_000_000)
    # The last of these ranks would have a window and no token after it.
    most = load_manifest(config.data.path).document["splits"]["valid"]["tokens"] // 32
    many = configure("--eval.sequences=1000000")
    needed = f"{(most + 1) * 32:,}"
    with pytest.raises(ConfigError, match=rf"each of {most} data-parallel ranks needs {needed}.*valid_fraction"):
        open_prepared_data(many, most)
    assert len(open_prepared_data(many, most - 1).validation["tiny"]) == most - 1
    assert not open_prepared_data(configure("--eval.every=0"), 1_000_000).validation
    assert len(open_prepared_data(config, 3).validation["tiny"]) == 3, "every rank takes the same number"


def test_data_is_verified_once_and_read_by_local_rank_0(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, verify = [], CorpusManifest.verify

    def counted(self: CorpusManifest, level: str = "size") -> None:
        levels.append(level)
        verify(self, level)

    monkeypatch.setattr(CorpusManifest, "verify", counted)
    for local_rank in (0, 1):
        open_prepared_data(configure("--data.verify=full"), 1, local_rank)
    open_prepared_data(configure(), 1)
    assert levels == ["full", "size", "size"]


def test_local_rank_0_makes_the_packing_plans(
    configure: Configure, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr("megatron_rdt.train.data.prepared.make_plans", lambda *arguments: made.append(arguments[-1]))
    make_plans(load_manifest(tiny_corpus), "train", 32)
    config = configure("--data.pack=bestfit", "--eval.every=0")
    for local_rank in (0, 1):
        open_prepared_data(config, 1, local_rank)
    assert made == [32]

    def full(*arguments: Any) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr("megatron_rdt.train.data.prepared.make_plans", full)
    monkeypatch.setattr(
        "megatron_rdt.object_collectives.gather_objects", lambda value: [value, DataError("of another node")]
    )
    for local_rank, message in ((0, "the disk is full"), (1, "of another node")):
        with pytest.raises(DataError, match=message):
            open_prepared_data(config, 1, local_rank)


def test_plans_lie_with_the_corpus(tiny_corpus: Path) -> None:
    path = plan_path(load_manifest(tiny_corpus), "train", "shard-00000", 256)
    assert path == tiny_corpus / "packing" / "L256" / "train" / "shard-00000.pack"
    check_config(RunConfig(), 1)


def test_ranks_that_read_different_corpora_are_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = "megatron_rdt.train.data.prepared.gather_objects"
    monkeypatch.setattr(gather, lambda mine: [mine, mine, {**mine, "tiny": ("another", mine["tiny"][1])}])
    with pytest.raises(DataError, match=r"rank 2 reads another corpus .*tiny than rank 0\. Give every node the same"):
        open_prepared_data(configure(), 3)
    monkeypatch.setattr(gather, lambda mine: [mine, mine, mine])
    assert open_prepared_data(configure(), 3).settings.keys() == {"tiny"}


def test_windows_that_validation_lacks_are_said(configure: Configure, tiny_corpus: Path) -> None:
    assert open_prepared_data(configure("--eval.sequences=4"), 2).describe(32) == []
    said = "validation takes 4 windows, fewer than eval.sequences 5: from each corpus a multiple of the 2 data-parallel ranks"
    assert open_prepared_data(configure("--eval.sequences=5"), 2).describe(32)[-1].startswith(said)
    available = load_manifest(tiny_corpus).document["splits"]["valid"]["tokens"] // 32 - 1
    lines = open_prepared_data(configure("--eval.sequences=1000000"), 1).describe(32)
    assert lines[-1].startswith(f"validation takes {available:,} windows, fewer than eval.sequences 1,000,000: ")
    assert open_prepared_data(configure("--eval.every=0", "--eval.sequences=5"), 2).describe(32) == []
