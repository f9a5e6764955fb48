"""Dense models of transformers, cut into prelude, core and coda: at T = 1 the logits are the dense model's."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from launch.commands.convert import convert as command
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import ModelConfig, RunConfig, load_config
from megatron_rdt.convert import convert, recognize
from megatron_rdt.convert.recognize import ImportOptions, plan_import
from megatron_rdt.convert.sources import dense
from megatron_rdt.convert.sources.llama_layers import MISTRAL_WINDOW
from megatron_rdt.data import Tokenizer
from megatron_rdt.depth.distributions import loop_probabilities
from megatron_rdt.depth.sampler import DepthSampler
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.inference import load
from megatron_rdt.model.injection.diagonal import DiagonalDecay
from tests.convert.imported import check_use, write_source

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(  # with a tied head
        **SIZES | {"tie_word_embeddings": True}, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "olmo2": Olmo2Config(**SIZES),
}
PADDING = 9  # rows of the embedding that no token uses


def make_dense(config: PreTrainedConfig, vocabulary: int) -> torch.nn.Module:
    """Return a model of transformers with random weights that matter, biases and gains included, in float64."""
    config = copy.deepcopy(config)
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    return model


def write_dense(folder: Path, config: PreTrainedConfig, tokenizer: Path) -> tuple[torch.nn.Module, Path]:
    """Write a dense model as transformers saves it; return it and its folder."""
    model = make_dense(config, Tokenizer(tokenizer).vocab_size + PADDING)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    weights = {name: value for name, value in model.state_dict().items() if "inv_freq" not in name}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return model, write_source(folder.with_name("source"), settings, weights, tokenizer, shards=3)


def without_layers(model: torch.nn.Module, kept: list[int]) -> torch.nn.Module:
    """Return the dense model with only these of its layers."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    return model


@pytest.mark.parametrize("cut", ["2,3,1", "1,2,2", "0,6,0"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_one_loop_is_the_dense_model(
    name: str, cut: str, tmp_path: Path, tokenizer_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """In float64, where the difference to the dense model is rounding; the command itself compares in float32."""
    dense_model, source = write_dense(tmp_path / "saved", CONFIGS[name], tokenizer_folders["hf"])
    checkpoint = convert(str(source), str(tmp_path / "out"), "native", ImportOptions(cut))
    assert "at T = 1 the logits are those of the dense model" in capsys.readouterr().out
    model, tokenizer = load(checkpoint, "cpu")
    assert model.config.vocab_size - model.config.unused_ids == tokenizer.vocab_size
    tokens = torch.randint(0, model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    kept = dense.list_kept_layers(tuple(map(int, cut.split(","))), 6)
    expected = without_layers(dense_model, kept)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens, 1), expected, rtol=1e-5, atol=2e-5)
    assert float((model(tokens, 2) - expected).abs().max()) > 0.01  # a second loop is not the dense model
    before, core = model.prelude, model.core
    assert (len(before), len(core.layers), len(model.coda)) == tuple(map(int, cut.split(",")))


def test_halves_add_up_to_the_encoded_input() -> None:
    """Decay and gain are exactly 1/2 in float32, so that h / 2 + e / 2 is e to the last bit where h is e."""
    for dim in (1, 7, 64, 100):
        decay = DiagonalDecay(ModelConfig(dim=dim))
        decay.load_state_dict({name: dense.make_half(dim, name) for name in ("rate", "step", "gain")})
        assert all(torch.equal(part, torch.full((dim,), 0.5)) for part in decay())


def check_depth(config: RunConfig) -> None:
    """Check what continue.yaml and docs/conversion.md say of T: where it begins and ends, and that the curriculum ends."""
    assert (config.depth.curriculum, config.train.steps, config.depth.curriculum_steps) == (
        "one_minus_sqrt",
        5000,
        1250,
    )
    for step, mean, share in ((0, 2, 0.4), (config.train.steps - 1, 5, 0.06)):
        now = dataclasses.replace(config.depth, mean=DepthSampler(config.depth, 1).mean_at(step))
        assert DepthSampler(now, 1).expected_loops == pytest.approx(mean, abs=0.02)
        assert loop_probabilities(now)[1] == pytest.approx(share, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_model_is_used_and_trained(
    name: str, tmp_path: Path, tokenizer_folders: dict[str, Path], byte_corpus: Path
) -> None:
    _, source = write_dense(tmp_path / "saved", CONFIGS[name], tokenizer_folders["hf"])
    (tmp_path / "work").mkdir()
    options = ImportOptions("2,3,1")
    checkpoint = check_use(source, byte_corpus, tokenizer_folders["hf"], tmp_path / "work", options)
    config = load_config(checkpoint / "continue.yaml")
    check_depth(config)
    manifest = checkpoints.read_manifest(checkpoint)
    assert manifest["converted_from"]["layers"] == [0, 1, 2, 3, 4, 5]


def test_the_cut_is_chosen_by_similarity(
    tmp_path: Path, tokenizer_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers 2 to 4 of this model add next to nothing, so they are the core."""
    model, _ = write_dense(tmp_path / "saved", CONFIGS["llama"], tokenizer_folders["hf"])
    weights = dict(model.state_dict())
    for name, value in weights.items():
        if any(name.startswith(f"model.layers.{i}.") for i in (2, 3, 4)) and ("o_proj" in name or "down" in name):
            weights[name] = value * 1e-3
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    source = write_source(tmp_path / "similar", settings, weights, tokenizer_folders["hf"])
    checkpoint = convert(str(source), str(tmp_path / "out"), "native")
    check_depth(load_config(checkpoint / "continue.yaml"))
    assert "--cut 2,3,1" in capsys.readouterr().out
    model, _ = load(tmp_path / "out", "cpu")
    assert (len(model.prelude), len(model.core.layers), len(model.coda)) == (2, 3, 1)


def test_out_is_checked_before_the_model_is_run(
    tmp_path: Path, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choosing a cut is a forward pass of the whole model."""
    _, source = write_dense(tmp_path / "saved", CONFIGS["llama"], tokenizer_folders["hf"])
    called = []
    monkeypatch.setattr(recognize, "choose_cut", lambda *_: called.append(True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        convert(str(source), str(tmp_path / "full"), "native")
    assert not called


@pytest.mark.parametrize("cut", ["auto", "2,3,1"])
def test_a_tokenizer_with_more_ids_than_rows_is_refused(
    cut: str, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    """Before a layer is run to choose the cut, whose prompt may have any of the ids."""
    ids = Tokenizer(tokenizer_folders["hf"]).vocab_size
    model = make_dense(CONFIGS["llama"], ids - 12)
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    source = write_source(tmp_path / "source", settings, dict(model.state_dict()), tokenizer_folders["hf"])
    with pytest.raises(DataError, match=rf"has {ids:,} ids, the embedding of .* {ids - 12:,} rows"):
        convert(str(source), str(tmp_path / "out"), "native", ImportOptions(cut))


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """transformers 5 uses such a head in spite of the config, earlier versions the embedding. An equal copy is no problem."""
    model, source = write_dense(tmp_path / "saved", CONFIGS["llama3"], tokenizer_folders["hf"])
    settings, weights = json.loads((source / "config.json").read_text()), dict(model.state_dict())
    copied = write_source(tmp_path / "copied", settings, weights, tokenizer_folders["hf"])
    convert(str(copied), str(tmp_path / "native"), "native", ImportOptions("2,3,1"))
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    other = write_source(tmp_path / "other", settings, weights, tokenizer_folders["hf"])
    for to in ("native", "hf"):
        with pytest.raises(CheckpointError, match=r"ties .* lm_head\.weight is not model\.embed_tokens\.weight"):
            convert(str(other), str(tmp_path / "out"), to, ImportOptions("2,3,1"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "window"), [({}, 4096), ({"sliding_window": None}, 0), ({"sliding_window": 7}, 7)]
)
def test_a_mistral_without_a_named_window_has_that_of_transformers(
    settings: dict[str, Any], window: int, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    _, source = write_dense(tmp_path / "saved", CONFIGS["mistral"], tokenizer_folders["hf"])
    document = json.loads((source / "config.json").read_text())
    del document["sliding_window"]
    assert MistralConfig().sliding_window == MISTRAL_WINDOW
    (source / "config.json").write_text(json.dumps(document | settings))
    assert plan_import(source, ImportOptions("2,3,1")).model.window == window


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_model_of_few_layers_is_cut_by_hand(
    layers: int, tmp_path: Path, tokenizer_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers})
    dense_model, source = write_dense(tmp_path / "saved", config, tokenizer_folders["hf"])
    with pytest.raises(ConfigError, match=f"takes 3 layers to choose a cut, this model has {layers}; give --cut"):
        convert(str(source), str(tmp_path / "out"), "native")
    checkpoint = convert(str(source), str(tmp_path / "out"), "native", ImportOptions(f"0,{layers},0"))
    tokens = torch.arange(20)[None]
    expected = dense_model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(load(checkpoint, "cpu")[0](tokens, 1), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types_become_float32(
    dtype: torch.dtype, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    """Each number is kept; of float64 the nearest."""
    model, _ = write_dense(tmp_path / "saved", CONFIGS["llama"], tokenizer_folders["hf"])
    weights = {name: value.to(dtype) for name, value in model.state_dict().items() if "inv_freq" not in name}
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    source = write_source(tmp_path / "typed", settings, weights, tokenizer_folders["hf"], shards=2)
    checkpoint = convert(str(source), str(tmp_path / "out"), "native", ImportOptions("2,3,1"))
    found = checkpoints.read_model_weights(checkpoint)
    assert torch.equal(found["prelude.1.feedforward.up.weight"], weights["model.layers.1.mlp.up_proj.weight"].float())
    assert torch.equal(found["head.weight"], weights["lm_head.weight"].float())


def test_what_does_not_fit_is_refused(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    _, source = write_dense(tmp_path / "saved", CONFIGS["llama"], tokenizer_folders["hf"])
    settings = json.loads((source / "config.json").read_text())
    for cut, message in (("2,4", "give the layers"), ("4,4,4", "does not fit a model of 6"), ("3,0,3", "at least 1")):
        with pytest.raises(ConfigError, match=message):  # an option that cannot work: exit status 2
            plan_import(source, ImportOptions(cut))
    changes: list[tuple[dict, str]] = [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "scaled by 'yarn'"),
        ({"num_hidden_layers": 5}, "do not exist in the config's network: model.layers.5"),
        ({"num_hidden_layers": 7}, "have no model.layers.6"),
        ({"hidden_size": None}, "hidden_size is None|no hidden_size"),
        ({"model_type": "hrm_text"}, "loops two stacks of layers"),
        ({"model_type": "smollm3"}, "without rotary positions"),
        ({"model_type": "gemma"}, "model_type is 'gemma'; known are Huginn"),
        ({"num_hidden_layers": 10**9}, "says 1,000,000,000 layers or experts, the files have"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it must be from 1 to"),
        ({"hidden_size": 10**30}, "model.dim is too large"),
        ({"max_position_embeddings": None}, "transformers refuses its config"),
        ({"rms_norm_eps": None}, "the config has no rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "norm_eps is -1"),
        ({"attention_dropout": "q"}, "transformers refuses its config .*attention_dropout"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings is 'false'"),
        ({"tie_word_embeddings": True}, "ties the output matrix to the embedding, but lm_head.weight is not"),
        ({"head_dim": "a"}, "head_dim is 'a', not a number"),
        ({"num_key_value_heads": "two"}, "kv_heads is 'two'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be from 1 to"),
        ({"layer_types": 3}, "another kind of value .*TypeError"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "another kind of value .*OverflowError"),
        ({"quantization_config": {"bits": 4}}, "weights are quantised"),
        ({"intermediate_size": 40}, "gives .* the shape .*different models"),
    ]
    for change, message in changes:
        (source / "config.json").write_text(json.dumps(settings | change))
        for words in ([], ["--dry_run"]):  # both before anything is written
            with pytest.raises(CheckpointError, match=message):
                command([str(source), str(tmp_path / "made" / "out"), "--to=native", "--cut=2,2,1", *words])
        assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".*"))
