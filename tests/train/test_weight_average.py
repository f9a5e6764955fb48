"""The moving average of the weights: equal to its formula, exact on resume, the same on every engine, and used by commands."""

import json
from pathlib import Path

import pytest
import torch

from launch.cli import run_command
from megatron_rdt.checkpoint import read_model_weights
from megatron_rdt.config import ParallelConfig, RunConfig, check_config
from megatron_rdt.convert.hf import read_hf
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.parallel import build_engine
from megatron_rdt.train.trainer import train
from tests.distributed.training import train_on
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow
DECAY = 0.6
EVERY_STEP = ["--eval.every=0", "--checkpoint.every=1", "--checkpoint.keep=0"]

Weights = dict[str, torch.Tensor]


def find_checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def initial_weights(config: RunConfig) -> Weights:
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    return dict(initialize(model, config.run.seed).named_parameters())


def average_by_hand(first: Weights, steps: list[Weights]) -> Weights:
    """The formula in float64, one step after another."""
    average = {name: weights.detach().double() for name, weights in first.items()}
    for step in steps:
        average = {name: DECAY * average[name] + (1 - DECAY) * step[name].double() for name in average}
    return average


def assert_close(found: Weights, expected: Weights) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7, msg=name)


@pytest.fixture(scope="module")
def run(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average and a checkpoint of every step."""
    root = tmp_path_factory.mktemp("average")
    assert train(configure(f"--run.root={root}", f"--optimizer.ema={DECAY}", *EVERY_STEP)) == 0
    return root / "run"


def test_it_follows_its_formula_and_changes_no_loss(run: Path, configure: Configure, tmp_path: Path) -> None:
    steps = [read_model_weights(find_checkpoint(run, step)) for step in range(1, 9)]
    for step in (1, 8):
        expected = average_by_hand(initial_weights(configure()), steps[:step])
        assert_close(read_model_weights(find_checkpoint(run, step), "ema"), expected)
    assert train(configure(f"--run.root={tmp_path}", "--eval.every=0")) == 0
    losses = [[r["loss"] for r in read_records(path / "metrics.jsonl")] for path in (run, tmp_path / "run")]
    assert losses[0] == losses[1]
    assert not (find_checkpoint(tmp_path / "run", 8) / "ema").exists()


def test_a_skipped_step_leaves_it_as_it_is(configure: Configure) -> None:
    engine = build_engine(configure(f"--optimizer.ema={DECAY}"), torch.device("cpu"))
    for name, parameter in engine.model.named_parameters():
        parameter.grad = torch.full_like(parameter, 0.1 + len(name))
    engine.step(0.01, torch.tensor(True))
    before = {name: tensor.clone() for name, tensor in engine.average.tensors.items()}  # type: ignore[attr-defined]
    for parameter in engine.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    engine.step(0.01, torch.tensor(False))
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.average.tensors.items())  # type: ignore[attr-defined]
    assert any(not torch.equal(before[name], weights) for name, weights in engine.model.named_parameters())


def test_it_resumes_exactly(run: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(f"--run.root={tmp_path}", f"--optimizer.ema={DECAY}", *EVERY_STEP)
    assert train(config, str(find_checkpoint(run, 4))) == 0
    straight, resumed = (read_model_weights(find_checkpoint(path, 8), "ema") for path in (run, tmp_path / "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_run_that_turns_it_on_begins_with_its_weights(configure: Configure, tmp_path: Path) -> None:
    assert train(configure(f"--run.root={tmp_path}", *EVERY_STEP)) == 0
    source = find_checkpoint(tmp_path / "run", 6)
    options = [f"--run.root={tmp_path}", "--run.name=later", f"--optimizer.ema={DECAY}"]
    assert train(configure(*options, *EVERY_STEP), str(source)) == 0
    later = tmp_path / "later"
    steps = [read_model_weights(find_checkpoint(later, step)) for step in (7, 8)]
    parameters = initial_weights(configure())
    first = {name: weights for name, weights in read_model_weights(source).items() if name in parameters}
    assert_close(read_model_weights(find_checkpoint(later, 8), "ema"), average_by_hand(first, steps))


def test_deepspeed_refuses_it() -> None:
    from dataclasses import replace

    config = RunConfig()
    config = replace(config, parallel=ParallelConfig("zero2"), optimizer=replace(config.optimizer, ema=0.9))
    with pytest.raises(ConfigError, match=r"optimizer\.ema averages weights .* Set --parallel\.engine fsdp"):
        check_config(config)


def test_commands_use_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, results = tmp_path / "export", {}
    assert run_command(["convert", str(run), str(export), "--weights", "ema"]) == 0
    average = read_model_weights(find_checkpoint(run, 8), "ema")
    exported = read_hf(export)[1]
    assert all(torch.equal(exported[name], tensor) for name, tensor in average.items())
    assert "exponential moving average, decay 0.6" in (export / "README.md").read_text()
    for weights in ("model", "ema"):
        out = tmp_path / f"{weights}.json"
        words = ["--loops", "[2]", "--sequences", "4", "--weights", weights]
        assert run_command(["eval", str(run), *words, "--out", str(out)]) == 0
        results[weights] = json.loads(out.read_text())
    assert results["ema"]["weights"] == "ema"
    assert results["ema"]["losses"] != results["model"]["losses"]
    assert not (run / "eval.json").exists()
    capsys.readouterr()
    assert run_command(["eval", str(run), "--loops", "[2]", "--sequences", "4", "--weights", "ema"]) == 0
    assert "eval.json is of the run's weights, so no eval.json is written" in capsys.readouterr().out
    assert not (run / "eval.json").exists()
    texts = {}
    for source, weights in ((run, "ema"), (export, "model"), (run, "model")):
        words = ["--prompt", "def ", "--tokens", "12", "--loops", "3", "--weights", weights, "--device", "cpu"]
        assert run_command(["generate", str(source), *words]) == 0
        texts[source, weights] = capsys.readouterr().out
    assert texts[run, "ema"] == texts[export, "model"]


def test_checkpoints_without_it_are_refused(
    finished: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["generate", str(finished), "--weights", "ema", "--tokens", "1"]) == 1
    assert "has no average of its weights" in capsys.readouterr().err
    assert run_command(["convert", str(run), str(tmp_path / "zero"), "--to", "zero", "--weights", "ema"]) == 2
    assert "--weights is for --to hf" in capsys.readouterr().err
    assert run_command(["convert", str(run), str(tmp_path / "zero"), "--to", "zero"]) == 0
    assert "the average of the weights (optimizer.ema) is left out" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("engine", "more"), [("ddp", []), ("fsdp", []), ("fsdp", ["--parallel.tensor=2"])], ids=str)
def test_engines_agree(engine: str, more: list[str], run: Path, tiny_options: list[str], tmp_path: Path) -> None:
    """Sharded as the parameters are, saved whole, and resumed: as one process averages, up to the rounding of its steps."""
    options = [
        *tiny_options,
        f"--run.root={tmp_path}",
        f"--parallel.engine={engine}",
        f"--optimizer.ema={DECAY}",
        *more,
    ]
    train_on(2, [*options, *EVERY_STEP])
    expected = read_model_weights(find_checkpoint(run, 8), "ema")
    found = read_model_weights(find_checkpoint(tmp_path / "run", 8), "ema")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    again = [*options, *EVERY_STEP, "--run.name=again", f"--resume={find_checkpoint(tmp_path / 'run', 4)}"]
    train_on(2, again)
    resumed = read_model_weights(find_checkpoint(tmp_path / "again", 8), "ema")
    assert all(torch.equal(found[name], resumed[name]) for name in found)


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_the_stages_of_a_loop_ring_average_their_own_layers(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, *EVERY_STEP, f"--run.root={tmp_path}", "--parallel.engine=fsdp", "--train.steps=4"]
    options += ["--model.core_layers=2", f"--optimizer.ema={DECAY}", "--optimizer.state_dtype=bfloat16"]
    half = find_checkpoint(tmp_path / "ring", 2)
    for name, more in {"ring": [], "again": [f"--resume={half}"], "plain": ["--parallel.core_ring=1"]}.items():
        train_on(2, [*options, "--parallel.core_ring=2", f"--run.name={name}", *more])
    ring, again, plain = (
        read_model_weights(find_checkpoint(tmp_path / name, 4), "ema") for name in ("ring", "again", "plain")
    )
    assert ring.keys() == plain.keys()
    for name, tensor in ring.items():
        assert torch.equal(tensor, again[name]), name
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=2e-4, msg=name)
