"""Parameter groups: the optimizer, learning rate and weight decay of every parameter; AdamW is torch's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig, check_config
from megatron_rdt.convert import convert
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import MicroBatch, make_engine
from megatron_rdt.parallel.optimizers import adamw_groups, muon_groups
from megatron_rdt.planner.run_plan import make_layout
from megatron_rdt.train import trainer

SMALL = ModelConfig(vocab_size=61, dim=32, prelude_layers=1, core_layers=1, coda_layers=1, heads=4, kv_heads=2)
EVERYTHING = dataclasses.replace(
    SMALL,
    core_ffn="moe",
    experts=4,
    norm_placement="peri",
    core_norm="iteration",
    qk_norm="learned",
    qk_bias=True,
    value_embeddings="gated",
    input_matrix=True,
    output_matrix=True,
    state_init="learned",
    signals=["sinusoidal", "lora", "adaln"],
    halting="act",
    tie_embeddings=False,
)


def names(groups: list[dict], model: torch.nn.Module) -> list[set[str]]:
    found = {parameter: name for name, parameter in model.named_parameters()}
    return [{found[parameter] for parameter in group["params"]} for group in groups]


def build(config: ModelConfig) -> RecurrentDepthTransformer:
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


@pytest.mark.parametrize("injection", ["diagonal", "residual", "linear", "add", "gate", "hyper"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_who_steps_what_with_which_decay(injection: str, optimizer: str) -> None:
    model = build(dataclasses.replace(EVERYTHING, injection=injection, value_embeddings="gated"))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tables = {n for n in shapes if n.endswith(("embedding.weight", "head.weight", "token_values.weight"))}
    config = OptimizerConfig(name=optimizer, weight_decay=0.3, core_lr_scale=0.25)
    decayed, plain = names(adamw_groups(model, config), model)
    vectors = {name for name, shape in shapes.items() if len(shape) < 2}
    ends = {"core.input_matrix.weight", "core.output_matrix.weight"}
    injected = {n for n, shape in shapes.items() if n.startswith("core.injection.") and len(shape) == 2}
    assert {n.rsplit(".", 1)[1] for n in injected} == {"linear": {"weight"}, "gate": {"weight"}, "hyper": {"mix"}}.get(
        injection, set()
    )
    assert [g["weight_decay"] for g in adamw_groups(model, config)] == [0.3, 0.0]
    if optimizer == "adamw":
        assert plain == vectors | ends | injected
        assert decayed == set(shapes) - plain
        assert not muon_groups(model, config)
        return
    mixing = {name for name in injected if name.endswith("mix")}
    assert decayed == tables
    assert plain == vectors | mixing
    groups = muon_groups(model, config)
    by_options = {(g["lr_scale"], g["weight_decay"]): found for g, found in zip(groups, names(groups, model))}
    assert by_options.pop((1.0, 0.0)) == ends
    assert by_options.pop((0.25, 0.0), set()) == injected - mixing
    reused, once = by_options.pop((0.25, 0.3)), by_options.pop((1.0, 0.3))
    assert not by_options
    assert reused | once == set(shapes) - decayed - plain - ends - injected
    assert {n.split(".")[0] for n in once} == {"prelude", "coda"}
    for name in ("layers.0.attention.query.weight", "layers.0.feedforward.gate", "signals.lora.up"):
        assert f"core.{name}" in reused
    assert "core.halting.weight" in plain
    assert "core.initial" in plain


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_patterns_exempt_parameters_from_decay(optimizer: str) -> None:
    model = build(EVERYTHING)

    def decays(*patterns: str) -> dict[str, float]:
        config = OptimizerConfig(name=optimizer, weight_decay=0.3, no_weight_decay=[*patterns])
        groups = [*adamw_groups(model, config), *muon_groups(model, config)]
        assert all(group["params"] for group in groups)
        return {n: g["weight_decay"] for g, found in zip(groups, names(groups, model)) for n in found}

    before = decays()
    cases: list[tuple[list[str], Callable[[str], bool]]] = [
        (["embedding.*"], lambda name: name == "embedding.weight"),
        (["embedding.*", "core.*"], lambda name: name.split(".")[0] in ("embedding", "core")),
        (["[eh]*", "*.token_values.*"], lambda name: name[0] in "eh" or ".token_values." in name),
    ]
    for patterns, is_exempt in cases:
        assert any(decay and is_exempt(name) for name, decay in before.items())
        assert decays(*patterns) == {name: 0.0 if is_exempt(name) else decay for name, decay in before.items()}
    assert decays("Core.*") == before  # case counts


def test_exempt_parameters_shrink_with_gradients_only() -> None:
    """One step at a large decay: the embedding takes the step of a run without decay, the layers do not."""
    decayed, exempt, plain = (
        train(OptimizerConfig(lr=0.01, weight_decay=decay, no_weight_decay=patterns), steps=1)
        for decay, patterns in ((5.0, []), (5.0, ["embedding.*"]), (0.0, []))
    )
    for name, weight in exempt.items():
        if name.startswith("embedding."):
            assert torch.equal(weight, plain[name])
            assert not torch.equal(weight, decayed[name])
        else:
            assert torch.equal(weight, decayed[name])


def test_patterns_that_match_nothing_or_everything_are_refused(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    options = [f"--run.root={tmp_path}"]
    wrong = configure(*options, "--optimizer.no_weight_decay=embedding.*,embeddings.*")
    assert wrong.optimizer.no_weight_decay == ["embedding.*", "embeddings.*"]
    message = (
        r"the pattern 'embeddings\.\*', which matches no parameter .*names are such as embedding\.weight, .*core\."
    )
    with pytest.raises(ConfigError, match=message):
        trainer.train(wrong)
    with pytest.raises(ConfigError, match=message):
        make_layout(wrong, 1)
    with pytest.raises(ConfigError, match=r"leaves no parameter with weight decay\. Set --optimizer\.weight_decay 0"):
        trainer.train(configure(*options, "--optimizer.no_weight_decay=*"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_patterns_may_change_on_resume(
    optimizer: str, configure: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of groups changes too; the state of every parameter stays its own."""
    options = [f"--run.root={tmp_path}", "--eval.every=0", f"--optimizer.name={optimizer}"]
    assert trainer.train(configure(*options, "--train.steps=2", "--optimizer.no_weight_decay=embedding.*,core.*")) == 0
    source = tmp_path / "run" / "checkpoints" / "step-00000002"

    def load(*patterns: str) -> tuple[dict[str, dict], dict[str, float]]:
        config = configure(*options, *patterns)
        engine = make_engine(config, torch.device("cpu"))
        engine.setup(build(config.model))
        engine.load(source)
        found = {parameter: name for name, parameter in engine.model.named_parameters()}
        optimizers = engine.optimizers  # type: ignore[attr-defined]
        states = {found[p]: state for each in optimizers for p, state in each.state.items()}
        groups = [group for each in optimizers for group in each.param_groups]
        return states, {found[p]: group["weight_decay"] for group in groups for p in group["params"]}

    same, decays = load("--optimizer.no_weight_decay=embedding.*,core.*")
    other, other_decays = load()
    assert {n for n in decays if decays[n] != other_decays[n]} >= {
        "embedding.weight",
        "core.layers.0.feedforward.up.weight",
    }
    assert same.keys() == other.keys() == decays.keys()
    for name, state in same.items():
        assert state
        for key, value in state.items():
            assert torch.equal(value, other[name][key]), (name, key)
    capsys.readouterr()
    assert trainer.train(configure(*options, "--train.steps=3"), "auto") == 0
    assert "optimizer.no_weight_decay ['embedding.*', 'core.*'] -> []" in capsys.readouterr().out
    assert trainer.train(configure(*options, "--train.steps=4", "--optimizer.no_weight_decay=coda.*"), "auto") == 0


def run_config(optimizer: OptimizerConfig) -> RunConfig:
    return RunConfig(model=SMALL, train=TrainConfig(), optimizer=optimizer, parallel=ParallelConfig(engine="single"))


def train(optimizer: OptimizerConfig, steps: int = 3) -> dict[str, torch.Tensor]:
    engine = make_engine(run_config(optimizer), torch.device("cpu"))
    engine.setup(build(SMALL))
    tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        engine.forward_backward([MicroBatch(Batch(tokens), DepthPlan.constant(2, 4))])
        engine.clip(1.0)
        engine.step(optimizer.lr)
    return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def test_adamw_is_torch_adamw() -> None:
    config = OptimizerConfig(weight_decay=0.3, lr=0.01)
    trained = train(config)
    engine = make_engine(run_config(config), torch.device("cpu"))
    engine.setup(build(SMALL))
    weights = dict(engine.model.named_parameters())
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "foreach": False}
    groups = [[p for p in weights.values() if p.dim() >= 2], [p for p in weights.values() if p.dim() < 2]]
    expected = [torch.optim.AdamW(g, weight_decay=w, **options) for g, w in zip(groups, (0.3, 0.0))]
    tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        engine.forward_backward([MicroBatch(Batch(tokens), DepthPlan.constant(2, 4))])
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in expected:
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight.detach(), rtol=1e-4, atol=1e-5)


def test_the_loop_gets_its_own_rate() -> None:
    """With everything else equal, the first step of the core is `core_lr_scale` times as long, and no other's."""
    before = train(OptimizerConfig(name="muon", weight_decay=0.0), steps=0)
    whole, half = (train(OptimizerConfig(name="muon", weight_decay=0.0, core_lr_scale=s), steps=1) for s in (1.0, 0.5))
    for name, start in before.items():
        scale = 0.5 if name.startswith("core.layers.") and start.dim() == 2 else 1.0
        torch.testing.assert_close(half[name] - start, scale * (whole[name] - start), rtol=1e-3, atol=1e-6)
        assert not torch.equal(whole[name], start), name


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_is_refused(engine: str) -> None:
    config = dataclasses.replace(run_config(OptimizerConfig(name="muon")), parallel=ParallelConfig(engine=engine))
    with pytest.raises(ConfigError, match="flattens"):
        check_config(config, 2)


def test_a_run_keeps_its_optimizer(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Options may change on resume, the optimizer may not; its state goes to no engine that has none."""
    options = [f"--run.root={tmp_path}", "--train.steps=4", "--eval.every=0", "--optimizer.name=muon"]
    assert trainer.train(configure(*options)) == 0
    source = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError, match=r"trained with optimizer\.name muon.* Set --optimizer\.name muon"):
        trainer.train(configure(*options[:-1], "--run.name=other"), str(source))
    with pytest.raises(CheckpointError, match=r"muon, whose state only .* rdt convert .* --to hf"):
        convert(str(source), str(tmp_path / "zero"), "zero")
    changed = ["--optimizer.momentum=0.5", "--optimizer.nesterov=false", "--optimizer.core_lr_scale=0.125"]
    engine = make_engine(configure(*options, *changed), torch.device("cpu"))
    engine.setup(build(engine.config.model))
    engine.load(source)
    groups = engine.optimizers[1].param_groups  # type: ignore[attr-defined]
    assert {(g["momentum"], g["nesterov"], g["ns_steps"]) for g in groups} == {(0.5, False, 5)}
    assert {g["lr_scale"] for g in groups} == {1.0, 0.125}


def test_the_shape_before_zero_sharded_it_decides() -> None:
    model = RecurrentDepthTransformer(SMALL)
    before = [len(group["params"]) for group in adamw_groups(model, OptimizerConfig())]
    assert min(before) > 4
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert [len(group["params"]) for group in adamw_groups(model, OptimizerConfig())] == before
