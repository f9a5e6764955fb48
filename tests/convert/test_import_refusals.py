"""Sources that are damaged, are not there, or hold another kind of model are refused with a sentence that says why."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch.commands.convert import convert as command
from megatron_rdt.convert import convert
from megatron_rdt.convert.recognize import ImportOptions
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from tests.convert.imported import write_shards
from tests.convert.looped_sources import HUGINN, PARCAE, write_huginn


@pytest.fixture
def tokenizer(tokenizer_folders: dict[str, Path]) -> Path:
    return tokenizer_folders["hf"]


@dataclass
class Huginn:
    """A Huginn folder to be damaged.

    Attributes:
        source, out: the folder, and where its checkpoint would go.
        settings, weights: what it holds.
    """

    source: Path
    out: Path
    settings: dict[str, Any]
    weights: dict[str, torch.Tensor]

    def refused(self, message: str, error: type[Exception] = CheckpointError, to: str = "native") -> None:
        with pytest.raises(error, match=message):
            convert(str(self.source), str(self.out), to)
        assert not self.out.exists()


@pytest.fixture
def huginn(tmp_path: Path, tokenizer: Path) -> Huginn:
    weights = write_huginn(tmp_path / "huginn", tokenizer)
    settings = json.loads((tmp_path / "huginn" / "config.json").read_text())
    return Huginn(tmp_path / "huginn", tmp_path / "out", settings, weights)


def test_settings_that_do_not_fit_are_refused(huginn: Huginn) -> None:
    source, out, settings, refused = huginn.source, huginn.out, huginn.settings, huginn.refused
    heads, rows = HUGINN["num_attention_heads"], len(huginn.weights["transformer.wte.weight"])
    refused("has no optimizer state", ConfigError, "zero")
    for change, message in (
        ({"injection_type": "add"}, "injection_type is 'add'; of Huginn only"),
        ({"n_embd": None}, "the config has no n_embd"),
        ({"n_embd": "48"}, "n_embd is '48', not a number"),
        ({"n_layers_in_coda": 1}, r"do not exist in the config's network: transformer\.coda\.1"),
        ({"intermediate_size": 44}, "Weights and config are of different models"),
        ({"mean_recurrence": "x"}, "mean_recurrence is 'x', not a number"),
        ({"mean_backprop_depth": [1]}, r"mean_backprop_depth is \[1\], not a number"),
        ({"norm_eps": True}, "norm_eps is True, not a number"),
        ({"rope_base": "x"}, "rope_base is 'x', not a number"),
        ({"num_attention_heads": 2 * HUGINN["num_attention_heads"]}, r"qk_bias cannot be converted: it is of \d heads"),
        ({"mean_recurrence": 0}, "mean_recurrence is 0; it must be from 1 to"),
        ({"mean_backprop_depth": -2}, "mean_backprop_depth is -2; it must be from 1 to"),
        ({"mean_recurrence": 2**62}, "mean_recurrence is 4611686018427387904; it must be from 1 to"),
        ({"vocab_size": rows + 1}, rf"the config's vocabulary has {rows + 1:,} ids, the embedding {rows:,} rows"),
        (
            {"num_key_value_heads": heads // 2},
            r"Wqkv\.weight cannot be converted: it has \d+ rows, the config's network",
        ),
        ({"num_key_value_heads": heads + 1}, r"is not a multiple of model\.kv_heads \d+\. Use another checkpoint\.$"),
    ):
        (source / "config.json").write_text(json.dumps(settings | change))
        refused(message)
        with pytest.raises(CheckpointError, match=message):
            command([str(source), str(out), "--dry_run"])
    (source / "config.json").write_text("[]")
    refused("holds no JSON object")


def test_damaged_weights_are_refused(huginn: Huginn) -> None:
    source, weights, refused = huginn.source, huginn.weights, huginn.refused
    save_file({name: value * float("nan") for name, value in weights.items()}, source / "model.safetensors")
    refused(r"holds [\d,]+ numbers that are not finite, the first at \[0")
    last = weights["transformer.wte.weight"].clone()
    last[-1, 3] = float("inf")  # of a row that the prompt, of which logits are computed, does not have
    save_file(weights | {"transformer.wte.weight": last}, source / "model.safetensors")
    refused(rf"transformer\.wte\.weight holds 1 numbers that are not finite, the first at \[{len(last) - 1}, 3\]")
    save_file({name: value.to(torch.int8) for name, value in weights.items()}, source / "model.safetensors")
    refused(r"stored as torch\.int8")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused("is damaged")


def test_an_index_that_does_not_fit_is_refused(huginn: Huginn) -> None:
    source, weights, refused = huginn.source, huginn.weights, huginn.refused
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused("outside of its folder")
    for wrong in (["model.safetensors"], {"a": ["model.safetensors"]}, {"a": 1}, {}, None):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        refused("has no weight_map that names a file for each weight")
    (source / "model.safetensors.index.json").write_text("{}")
    refused("has no weight_map that names a file for each weight")
    (source / "model.safetensors.index.json").unlink()
    write_shards(source, weights, 2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.wte.weight"] = index["weight_map"]["transformer.ln_f.weight"]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"says that transformer\.wte\.weight is in model-0000\d-of-00002\.safetensors, which does not hold it")


def test_what_is_no_state_dict_of_the_model_is_refused(huginn: Huginn) -> None:
    source, weights, settings, refused = huginn.source, huginn.weights, huginn.settings, huginn.refused
    (source / "model.safetensors").unlink()
    torch.save({1: torch.ones(2)}, source / "model.pt")
    refused("holds no state dict: a dictionary of tensors by name")
    torch.save(weights | {"transformer.wte.weight": torch.ones(())}, source / "model.pt")
    refused("another kind of value .*IndexError")
    (source / "model.pt").unlink()
    qk_bias = {name: value[:1] if name.endswith("qk_bias") else value for name, value in weights.items()}
    save_file({name: value.contiguous() for name, value in qk_bias.items()}, source / "model.safetensors")
    refused("attn.qk_bias cannot be converted: index 1")
    with pytest.raises(CheckpointError, match=r"attn\.qk_bias cannot be converted: index 1"):
        command([str(source), str(huginn.out), "--dry_run"])
    (source / "model.safetensors").unlink()
    (source / "config.json").write_text(json.dumps(PARCAE | {"rope_settings": [1]}))
    torch.save(weights, source / "model.pt")
    refused("another kind of value .*TypeError")
    (source / "config.json").write_text(json.dumps(settings))
    twice = {"module.transformer.wte.weight": weights["transformer.wte.weight"] + 1}
    torch.save(weights | twice, source / "model.pt")  # as many names, and one fewer without the wrapper
    refused("holds .*transformer.wte.weight and .*transformer.wte.weight, which are the same weight")
    torch.save({"model": weights, "cfg": source}, source / "model.pt")  # a Path object: code would have to run
    refused("cannot be opened without running code")


def test_a_damaged_tokenizer_is_named_with_the_reason(tmp_path: Path, tokenizer: Path) -> None:
    """Also where another, whole one lies near: nothing is passed over."""
    write_huginn(tmp_path / "huginn", tokenizer)
    source, out = tmp_path / "huginn", str(tmp_path / "out")
    shutil.copytree(tokenizer, source / "tokenizer")
    file = source / "tokenizer.json"
    content = file.read_bytes()
    (source / "tokenizer.model").write_bytes(b"not SentencePiece's")  # as of other libraries; the other file is taken
    assert command([str(source), out, "--dry_run"]) == 0
    for damaged, reason in ((content[:300], "cannot be read as JSON"), (b"{}", "describes no model")):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"tokenizer\.json {reason}.*--tokenizer"):
            command([str(source), out])
    file.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model .*--tokenizer"):
        command([str(source), out])
    (source / "tokenizer.model").unlink()
    assert command([str(source), out, "--dry_run"]) == 0  # with the one in tokenizer/
    shutil.rmtree(source / "tokenizer")
    with pytest.raises(ConfigError, match=r"there is no tokenizer in .*huginn\. Name the folder of one"):
        command([str(source), out])


def test_a_dry_run_refuses_what_the_conversion_would(tmp_path: Path, tokenizer: Path) -> None:
    write_huginn(tmp_path / "huginn", tokenizer)
    source, taken, file = tmp_path / "huginn", tmp_path / "taken", tmp_path / "file"
    file.touch()
    taken.mkdir()
    (taken / "kept").touch()
    for out, words, message in (
        (taken, [], "exists and is not empty"),
        (file, [], "is a file. Choose another OUT"),
        (source / "out", [], "lies in .*, which is read"),
        (tmp_path / "out", ["--shard_size=x"], "--shard_size is 'x'"),
    ):
        for more in ([], ["--dry_run"]):
            with pytest.raises(ConfigError, match=message):
                command([str(source), str(out), *words, *more])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "huginn", "taken"]


def test_a_source_that_does_not_exist_is_named_with_what_is_taken(tmp_path: Path) -> None:
    """Such as a name on the Hub; with --dry_run too, and for a file that holds no weights by its name."""
    missing, other, out = tmp_path / "meta-llama" / "Llama-3", tmp_path / "model.gguf", str(tmp_path / "out")
    other.touch()
    for source, problem in ((missing, "does not exist"), (other, "is a file")):
        message = rf"{re.escape(str(source))} {problem}.*another project's model.*nothing is downloaded"
        with pytest.raises(CheckpointError, match=message):
            convert(str(source), out, "native", ImportOptions("2,3,1"))
        with pytest.raises(CheckpointError, match=message):
            command([str(source), out, "--dry-run"])
