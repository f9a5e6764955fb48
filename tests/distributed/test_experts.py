"""Experts on every engine: exact resume, the balance of one process, conversion between the families, gradients."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.checkpoint import BUFFERS, read_model_weights
from megatron_rdt.config import RunConfig, dump_config
from megatron_rdt.convert import convert
from megatron_rdt.train.trainer import train
from tests.distributed.engine_worker import check_engine
from tests.distributed.experts_worker import train_experts
from tests.distributed.processes import run_on_processes

EXPERTS = [
    "--model.core_ffn=moe",
    "--model.experts=6",
    "--model.balance_rate=0.05",
    "--depth.checkpoint=per_iteration",
    "--train.steps=4",
    "--train.global_batch=4",
    "--train.micro_batch=1",
    "--checkpoint.every=2",
    "--checkpoint.keep=0",
    "--eval.every=2",
    "--sample.every=0",
]
NAME = "core.layers.0.feedforward.selection_bias"


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_gradients_of_experts_equal_one_process(engine: str) -> None:
    verdict = run_on_processes(check_engine, 2, engine, "experts", timeout=170)[0]
    assert verdict["world_size"] == 2
    differences = verdict["differences_2"]
    assert sum(".feedforward.shared." in name or ".router" in name for name in differences) == 2 * 4
    wrong = {name: value for name, value in differences.items() if not value < 3e-4}
    assert not wrong
    assert differences["loss"] < 1e-5
    assert verdict["discard_2"] < 3e-4


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(560)
def test_experts_on_every_engine(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Losses and biases of every engine on two processes are those of one process; resumed, digit for digit."""
    config = configure(*EXPERTS, f"--run.root={tmp_path}", "--run.name=single")
    assert train(config) == 0
    expected = [json.loads(line)["loss"] for line in (tmp_path / "single" / "metrics.jsonl").read_text().splitlines()]
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))

    engines = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    verdict = run_on_processes(train_experts, 2, file, engines, timeout=280)[0]
    checkpoints = {engine: tmp_path / engine / "checkpoints" / "step-00000004" for engine in ["single", *engines]}
    bias = torch.load(checkpoints["single"] / BUFFERS, weights_only=True)
    assert set(bias) == {NAME}
    assert float(bias[NAME].abs().max()) > 0.1
    for engine in engines:
        assert list(verdict[engine].values()) == pytest.approx(expected, rel=1e-5), engine
        assert torch.equal(torch.load(checkpoints[engine] / BUFFERS, weights_only=True)[NAME], bias[NAME]), engine
        assert torch.equal(read_model_weights(checkpoints[engine])[NAME], bias[NAME]), engine

    for source, family, there in (("fsdp", "zero", "zero3"), ("zero3", "native", "fsdp")):
        saved = tmp_path / source / "checkpoints" / "step-00000002"
        middle = read_model_weights(saved)[NAME]
        out = convert(str(saved), str(tmp_path / f"from-{source}"), family)
        assert float(middle.abs().max()) > 0
        assert torch.equal(read_model_weights(out)[NAME], middle)
        again = run_on_processes(train_experts, 2, file, [there], out, timeout=120)[0][there]
        assert list(again) == [3, 4]
        assert list(again.values()) == pytest.approx(expected[2:], rel=1e-5), (source, there)
