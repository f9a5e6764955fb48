"""Opening prepared data: what is refused, and the windows that each rank validates on."""

from pathlib import Path

import pytest
import torch

from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.data import load_manifest
from megatron_rdt.data.packing_plan import plan_path
from megatron_rdt.errors import ConfigError
from megatron_rdt.train.data.prepared import open_prepared_data
from tests.train.runs import Configure


def test_too_little_to_evaluate_is_refused_at_the_start(configure: Configure) -> None:
    config = configure("--eval.sequences=4")
    assert open_prepared_data(config, 1).validation["tiny"].count == 4
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
    assert open_prepared_data(many, most - 1).validation["tiny"].count == most - 1
    assert not open_prepared_data(configure("--eval.every=0"), 1_000_000).validation
    shares = [open_prepared_data(config, 3, rank).validation["tiny"] for rank in range(3)]
    assert [(share.count, len(share.rows)) for share in shares] == [(3, 1)] * 3, "every rank takes the same number"
    (whole,) = [open_prepared_data(config, 1).validation["tiny"].rows.tokens]
    assert torch.equal(torch.cat([share.rows.tokens for share in shares]), whole[:3])


def test_plans_lie_with_the_corpus(tiny_corpus: Path) -> None:
    path = plan_path(load_manifest(tiny_corpus), "train", "shard-00000", 256)
    assert path == tiny_corpus / "packing" / "L256" / "train" / "shard-00000.pack"
    check_config(RunConfig(), 1)


def test_windows_that_validation_lacks_are_said(configure: Configure, tiny_corpus: Path) -> None:
    assert open_prepared_data(configure("--eval.sequences=4"), 2).describe(32) == []
    said = "validation takes 4 windows, fewer than eval.sequences 5: from each corpus a multiple of the 2 data-parallel ranks"
    assert open_prepared_data(configure("--eval.sequences=5"), 2).describe(32)[-1].startswith(said)
    available = load_manifest(tiny_corpus).document["splits"]["valid"]["tokens"] // 32 - 1
    lines = open_prepared_data(configure("--eval.sequences=1000000"), 1).describe(32)
    assert lines[-1].startswith(f"validation takes {available:,} windows, fewer than eval.sequences 1,000,000: ")
    assert open_prepared_data(configure("--eval.every=0", "--eval.sequences=5"), 2).describe(32) == []
