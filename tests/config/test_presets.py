"""Presets of published sizes: they load, they build on the meta device, their parameters are counted to the last one.

Published totals: OpenMythos 0.5.0, counted on its own module; Parcae's and Huginn's, counted on theirs.
"""

import time
from pathlib import Path

import pytest
import torch

from launch.cli import main
from megatron_rdt.config import ModelConfig, RunConfig, check_config, load_config
from megatron_rdt.depth.distributions import loop_probabilities
from megatron_rdt.devices import DEVICES
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.iteration_signals import FEATURES
from megatron_rdt.planner.run_plan import make_plan

ROOT = Path(__file__).resolve().parents[2] / "configs" / "models"

# Name: parameters here, parameters of the published model.
TOTALS = {
    "huginn_3_5b": (3_564_976_800, 3_564_976_800),
    "openmythos_1b": (1_062_998_537, 1_064_028_034),
    "openmythos_3b": (3_041_729_033, 3_041_725_186),
    "openmythos_10b": (9_983_435_793, 9_981_316_994),
    "openmythos_50b": (50_374_255_393, 50_374_247_426),
    "openmythos_100b": (99_536_825_921, 99_545_072_130),
    "openmythos_500b": (497_849_153_153, 497_849_137_154),
    "openmythos_1t": (999_351_733_505, 999_326_352_386),
    "parcae_140m": (144_323_904, 144_323_136),
    "parcae_370m": (388_004_352, 388_003_328),
    "parcae_770m": (776_656_960, 776_655_680),
    "parcae_1_3b": (1_338_593_280, 1_338_591_744),
}


def ours_alone(name: str, config: RunConfig) -> dict[str, int]:
    """Parameters that this project has and the published model has not, by part; negative where it is the other way."""
    model = config.model
    if name.startswith("huginn"):
        return {}
    if name.startswith("parcae"):
        return {"gain of the input per channel; there it is the step": model.dim}
    rank, loops = model.signal_rank, int(config.depth.mean)
    dense = model.prelude_layers + model.coda_layers
    return {
        "step per channel; there one for all": model.dim - 1,
        "size of the loop index per channel; there 1": model.dim // 8,
        "adapter's weights as a function of t": rank * (FEATURES + 1),
        "adapter's table over t": -rank * loops,
        "dense layers of another width; there dim * 4 // 3": 3
        * model.dim
        * (model.ffn_dim - model.dim * 4 // 3)
        * dense,
    }


def test_every_preset_is_counted() -> None:
    assert {path.stem for path in ROOT.glob("*.yaml")} == set(TOTALS)


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    config = load_config(ROOT / f"{name}.yaml")
    check_config(config, 1)
    started = time.monotonic()
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    assert time.monotonic() - started < 10  # seconds, also for 1T
    count, published = TOTALS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert count - published == sum(ours_alone(name, config).values())


def test_large_parts_of_a_preset() -> None:
    """The numbers above from the published dimensions alone: Huginn's, layer by layer."""
    dim, inner, vocab = 5280, 17920, 65536
    layer = 4 * dim * dim + 2 * dim + 3 * dim * inner + 4 * dim  # attention, biases, feed-forward, norms
    assert vocab * dim + 8 * layer + 2 * dim * dim + dim == TOTALS["huginn_3_5b"][1]


@pytest.mark.parametrize("name", TOTALS)
def test_widths_split_over_tensor_parallel_ranks(name: str) -> None:
    """Odd widths make slow products, and tensor parallelism needs an equal share for each rank."""
    model = load_config(ROOT / f"{name}.yaml").model
    widths = [model.ffn_dim, *([model.expert_dim, model.shared_expert_dim] if model.core_ffn == "moe" else [])]
    assert [width % 128 for width in widths] == [0] * len(widths)


def test_depths_are_the_papers() -> None:
    """E[T] and the share of T < 8 of Huginn (section 3.3 gives log-normal Poisson with mean 32), Parcae's Poisson 8."""
    depth = load_config(ROOT / "huginn_3_5b.yaml").depth
    table = loop_probabilities(depth)
    assert float(table @ range(len(table))) == pytest.approx(33, abs=0.05)
    assert float(table[:8].sum()) == pytest.approx(0.009, abs=0.001)
    assert (depth.backprop, depth.per) == (8, "micro_batch")
    depth = load_config(ROOT / "parcae_140m.yaml").depth
    table = loop_probabilities(depth)
    assert float(table @ range(len(table))) == pytest.approx(8, abs=0.001)
    assert (depth.backprop, depth.per) == (4, "sequence")


@pytest.mark.parametrize("name", ["huginn_3_5b", "parcae_1_3b", "openmythos_1t"])
def test_print_config_shows_the_preset(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["rdt", "train", "--config", str(ROOT / f"{name}.yaml"), "--print_config"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "printed.yaml")
    assert config == load_config(ROOT / f"{name}.yaml")
    assert config.model != ModelConfig()


@pytest.mark.parametrize("name", TOTALS)
def test_the_plan_of_a_preset_has_a_time(name: str) -> None:
    config = load_config(ROOT / f"{name}.yaml", {"parallel": {"engine": "fsdp"}, "train": {"global_batch": 16384}})
    time = make_plan(config, 512, DEVICES["h100"], 0.4, advise=False).time
    assert time is not None
    assert 0 < time.bound < time.expected
