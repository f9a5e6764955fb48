"""This project's own weights in others' formats become checkpoints again: exports, DeepSpeed's universal and merged files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.convert import convert
from megatron_rdt.convert.recognize import ImportOptions
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.parallel.zero_universal import write_universal
from megatron_rdt.train.trainer import train
from tests.convert.imported import check_cut_is_refused, check_use, write_shards


@pytest.fixture(scope="module")
def finished(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps."""
    root = tmp_path_factory.mktemp("finished")
    assert train(configure(f"--run.root={root}", "--run.name=first", "--train.steps=2", "--eval.every=0")) == 0
    return root / "first"


def latest(run: Path) -> Path:
    return checkpoints.list_complete_checkpoints(run)[-1]


def test_a_cut_of_own_weights_is_refused(tmp_path: Path, finished: Path) -> None:
    """It would change nothing: an export and DeepSpeed's weights are looped already."""
    exported = convert(str(finished), str(tmp_path / "hf"), "hf")
    check_cut_is_refused(exported, tmp_path / "out", "export of this project")
    (tmp_path / "zero").mkdir()
    torch.save(checkpoints.read_model_weights(latest(finished)), tmp_path / "zero" / "pytorch_model.bin")
    config, tokens = (str(latest(finished) / name) for name in ("config.yaml", "tokenizer"))
    check_cut_is_refused(tmp_path / "zero", tmp_path / "out", "DeepSpeed's weights", tokens, config)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_an_export_comes_back(tmp_path: Path, finished: Path, tiny_corpus: Path, shards: int) -> None:
    """An export, saved again in bfloat16 and in several files as transformers would, is a checkpoint again."""
    exported = convert(str(finished), str(tmp_path / "hf"), "hf")
    weights = load_file(exported / "model.safetensors")
    if shards > 1:
        (exported / "model.safetensors").unlink()
        write_shards(exported, {name: weight.bfloat16() for name, weight in weights.items()}, shards)
    (tmp_path / "work").mkdir()
    checkpoint = check_use(exported, tiny_corpus, tiny_corpus / "tokenizer", tmp_path / "work")
    before, after = checkpoints.read_model_weights(latest(finished)), checkpoints.read_model_weights(checkpoint)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value if shards == 1 else value.bfloat16().float()), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["universal", "zero_to_fp32"])
def test_deepspeeds_weights_of_a_run(layout: str, tmp_path: Path, finished: Path, tiny_corpus: Path) -> None:
    """The universal layout, and what zero_to_fp32 writes: a state dict by our names, without the config of the run."""
    weights = checkpoints.read_model_weights(latest(finished))
    source = tmp_path / "source"
    source.mkdir()
    if layout == "universal":
        parts = {name: dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), value) for name, value in weights.items()}
        write_universal(source / "universal", parts, step=3)
        source = source / "universal"
    else:
        torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises((ConfigError, CheckpointError), match="--config"):
        convert(str(source), str(tmp_path / "out"), "native")
    options = ImportOptions(tokenizer=str(tiny_corpus / "tokenizer"), config=str(latest(finished) / "config.yaml"))
    (tmp_path / "work").mkdir()
    checkpoint = check_use(source, tiny_corpus, tiny_corpus / "tokenizer", tmp_path / "work", options)
    after = checkpoints.read_model_weights(checkpoint)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
