"""Check that a converted model evaluates, generates, exports and trains on, with the tokenizer of its source."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rdt.config import check_config, load_config
from megatron_rdt.convert import convert
from megatron_rdt.convert.import_checkpoint import CONTINUE
from megatron_rdt.convert.recognize import ImportOptions, plan_import
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from megatron_rdt.inference import generate, load
from megatron_rdt.train.trainer import train

STEPS = 10


def write_source(
    folder: Path, settings: dict, weights: dict[str, torch.Tensor], tokenizer: Path, shards: int = 1
) -> Path:
    """Write a model as a folder for transformers: config.json, one or several safetensors, tokenizer."""
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(settings))
    write_shards(folder, weights, shards)
    return folder


def write_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """Write weights into one safetensors file, or into several with their index."""
    names = sorted(weights)
    parts = [{name: weights[name].contiguous().clone() for name in names[i::shards]} for i in range(shards)]
    files = [
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)
    ]
    for file, part in zip(files, parts):
        save_file(part, folder / file)
    if shards > 1:
        index = {name: file for file, part in zip(files, parts) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def check_cut_is_refused(source: Path, out: Path, kind: str, tokenizer: str = "", config: str = "") -> None:
    """Check that --cut is refused for a looped source, which can be planned without it."""
    with pytest.raises(ConfigError, match=f"--cut is for dense models, .*{kind}.* Omit --cut"):
        convert(str(source), str(out), "native", ImportOptions("2,4,2", tokenizer, config))
    assert not out.exists()
    plan_import(source, ImportOptions("auto", tokenizer, config))


def check_use(source: Path, corpus: Path, tokenizer: Path, out: Path, options: ImportOptions | None = None) -> Path:
    """Convert a source, then evaluate, generate, export and train on; return the checkpoint.

    Args:
        source: folder or file.
        corpus: prepared with its tokenizer.
        tokenizer: its folder.
        out: an empty folder for everything that is written.
        options: of the conversion.
    """
    checkpoint = convert(str(source), str(out / "native"), "native", options)
    for family, message in (("native", "is native already.* --init"), ("zero", "holds weights alone.* --init")):
        with pytest.raises(CheckpointError, match=message):
            convert(str(checkpoint), str(out / "again"), family)
    assert Tokenizer(checkpoint / "tokenizer").fingerprint == Tokenizer(tokenizer).fingerprint

    evaluate_checkpoint(str(checkpoint), [1, 2], 2, str(corpus), str(out / "eval.json"))
    losses = json.loads((out / "eval.json").read_text())
    assert losses

    model, carried = load(checkpoint, "cpu")
    tokens = torch.tensor([carried.encode("def read(self, size):")])
    continued = generate(model, tokens, loops=2, new_tokens=5, temperature=0)
    assert continued.shape == (1, tokens.shape[1] + 5)
    sampled = generate(model, tokens, loops=1, new_tokens=20, temperature=50.0)
    assert int(sampled.max()) < carried.vocab_size  # of the padded rows of an embedding, none is drawn

    exported = convert(str(source), str(out / "hf"), "hf", options)
    again, _ = load(exported, "cpu")
    with torch.no_grad():
        for loops in (1, 3):
            assert torch.equal(model(tokens, loops), again(tokens, loops))

    words = {
        **{"run.root": out / "runs", "run.name": "on", "data.path": corpus, "data.max_epochs": 100},
        **{"train.steps": STEPS, "train.global_batch": 2, "train.micro_batch": 1, "train.sequence_length": 24},
        **{"train.device": "cpu", "schedule.warmup_steps": 2, "eval.every": 0, "logging.tensorboard": "false"},
        **{"checkpoint.every": STEPS, "optimizer.lr": 1e-3},
    }
    config = load_config(checkpoint / CONTINUE, [f"--{name}={value}" for name, value in words.items()])
    check_config(config, 1)
    with pytest.raises(CheckpointError, match=r"holds weights alone, .* --init"):
        train(config, resume=str(checkpoint))
    shutil.rmtree(out / "runs", ignore_errors=True)
    assert train(config, init=str(checkpoint)) == 0
    records = [json.loads(line) for line in (out / "runs" / "on" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["grad_norm"] > 0 for record in records)
    return checkpoint
