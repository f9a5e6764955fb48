"""A checkpoint goes from FSDP2 to ZeRO and back, optimizer included, and training goes on as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rdt.checkpoint import read_model_weights, verify
from megatron_rdt.config import load_config
from megatron_rdt.convert import convert
from megatron_rdt.convert.training_state import read_training_state
from megatron_rdt.errors import ConfigError
from megatron_rdt.train.trainer import train


def run(options: list[str], repository: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "train", "--config", "configs/smoke.yaml", *options]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def losses(run_directory: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_training_goes_on_in_the_other_family(tmp_path: Path, repository: Path, tiny_options: list[str]) -> None:
    common = [*tiny_options, f"--run.root={tmp_path}", "--eval.every=0", "--sample.every=0", "--checkpoint.keep=0"]
    run([*common, "--run.name=fsdp", "--parallel.engine=fsdp", "--nproc=2"], repository)
    straight = losses(tmp_path / "fsdp")
    saved = tmp_path / "fsdp" / "checkpoints" / "step-00000004"
    for_zero = convert(str(saved), str(tmp_path / "for_zero"), "zero")
    verify(for_zero)

    for engine, processes in (("zero1", 2), ("zero2", 1), ("zero3", 2)):
        name = f"{engine}-{processes}"
        options = [*common, f"--run.name={name}", f"--parallel.engine={engine}", f"--nproc={processes}"]
        run([*options, f"--resume={for_zero}"], repository)
        there = losses(tmp_path / name)
        assert sorted(there) == [5, 6, 7, 8]
        assert there == pytest.approx({step: straight[step] for step in there}, rel=1e-5)

        back = convert(str(tmp_path / name / "checkpoints" / "step-00000006"), str(tmp_path / f"back-{name}"), "native")
        run([*common, f"--run.name=back-run-{name}", "--parallel.engine=single", f"--resume={back}"], repository)
        again = losses(tmp_path / f"back-run-{name}")
        assert again == pytest.approx({step: straight[step] for step in (7, 8)}, rel=1e-5)


def test_nothing_is_lost_on_the_way(tmp_path: Path, repository: Path, tiny_options: list[str]) -> None:
    config = load_config(repository / "configs" / "smoke.yaml", [*tiny_options, f"--run.root={tmp_path}"])
    assert train(config) == 0
    first = convert(str(tmp_path / config.run.name), str(tmp_path / "zero"), "zero")
    second = convert(str(first), str(tmp_path / "native"), "native")
    before = read_training_state(tmp_path / config.run.name / "checkpoints" / "step-00000008", config)
    assert before.step == 8
    assert all(float(parts["exp_avg_sq"].abs().max()) > 0 for parts in before.tensors.values())
    for folder in (first, second):
        after = read_training_state(folder, config)
        assert after.step == before.step
        assert set(after.tensors) == set(before.tensors)
        for name, parts in before.tensors.items():
            for key, tensor in parts.items():
                assert torch.equal(after.tensors[name][key], tensor), (folder.name, name, key)
        weights = read_model_weights(folder)
        assert all(torch.equal(weights[name], parts["fp32"]) for name, parts in before.tensors.items())
        assert json.loads((folder / "manifest.json").read_text())["converted_from"]
    with pytest.raises(ConfigError, match="not empty"):
        convert(str(first), str(second), "native")
