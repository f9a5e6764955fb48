"""Checkpoints and an export written before modules and attributes were renamed still load, resume and answer alike.

`saved/runs_and_export.tar.xz` holds two runs of four steps, an export, their corpus, and what the code that wrote them gave:
losses of the two steps after the checkpoint, and logits. `saved/tensor_names.json` has the names and shapes of all
parameters and buffers for each choice of the model.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_rdt
from launch.cli import run_command
from megatron_rdt.config import ModelConfig
from megatron_rdt.model import RecurrentDepthTransformer

SAVED = Path(__file__).resolve().parent / "saved"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with tarfile.open(SAVED / "runs_and_export.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def expected(saved: Path) -> dict[str, Any]:
    return json.loads((saved / "expected.json").read_text())


def losses(run: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(record["step"]): record["loss"] for record in records if record["step"] > 4}


@pytest.mark.parametrize("name", ["native", "zero", "export"])
def test_gives_the_same_logits(saved: Path, name: str) -> None:
    model, _ = megatron_rdt.load(saved / name)
    for loops, wanted in expected(saved)["logits"][name].items():
        with torch.no_grad():
            logits = model(torch.tensor([[5, 99, 260, 17]]), depth=int(loops))[0, -1, :8]
        torch.testing.assert_close(logits.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["native", pytest.param("zero", marks=[pytest.mark.distributed, pytest.mark.timeout(120)])]
)
def test_resumes_with_the_same_losses(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    processes = ["--nproc", "2"] if name == "zero" else []
    words = ["train", "--config", f"{name}.yaml", "--train.steps", "6", "--resume", "auto", *processes]
    assert run_command(words) == 0
    assert losses(saved / name) == pytest.approx(expected(saved)["losses"][name], rel=1e-4)


@pytest.mark.parametrize(
    "case", json.loads((SAVED / "tensor_names.json").read_text()), ids=lambda case: json.dumps(case["model"])
)
def test_tensors_keep_their_names(case: dict[str, Any], base: Callable[..., ModelConfig]) -> None:
    with torch.device("meta"):
        model = RecurrentDepthTransformer(base(**case["model"]))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {name: list(tensor.shape) for name, tensor in tensors} == case["tensors"]


@pytest.fixture
def base() -> Callable[..., ModelConfig]:
    sizes = {"vocab_size": 37, "dim": 24, "prelude_layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 20}
    return lambda **options: ModelConfig(**sizes, **options)
