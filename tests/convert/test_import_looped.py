"""Checkpoints of other looped models, in their projects' own files: used and trained on; equal to plain references."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.commands.convert import convert as command
from megatron_rdt.convert import convert
from megatron_rdt.convert.import_plan import describe_rules
from megatron_rdt.convert.native_writer import write_weights
from megatron_rdt.convert.peers import from_open_mythos
from megatron_rdt.convert.recognize import ImportOptions, plan_import
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import ConfigError
from megatron_rdt.inference import load
from megatron_rdt.model.initial_state import normal_state
from tests.convert.imported import check_cut_is_refused, check_use, write_source
from tests.convert.looped_sources import PARCAE, Weights, small_weights, with_vocabulary, write_huginn
from tests.convert.ouro_reference import ouro_logits
from tests.parity import recorded
from tests.parity import test_parcae_and_huginn as parity

ROOT = Path(__file__).resolve().parents[2]
LOOPS = (1, 2, 4)


@pytest.fixture
def tokenizer(tokenizer_folders: dict[str, Path]) -> Path:
    return tokenizer_folders["hf"]


@pytest.fixture
def vocabulary(tokenizer: Path) -> int:
    return Tokenizer(tokenizer).vocab_size


@torch.no_grad()
def compare(checkpoint: Path, reference: Any, weights: Weights, std: float | None = None) -> None:
    """Compare a converted model with a plain reference in float64, at several T."""
    model, _ = load(checkpoint, "cpu")
    config = model.double().config
    tokens = torch.randint(0, config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(1))
    state = None
    if std is not None:
        state = normal_state((0,) * 3, torch.arange(13), config.dim, std).double()
    wide = {name: weight.double() for name, weight in weights.items()}
    for loops in LOOPS:
        torch.testing.assert_close(model(tokens, loops), reference(wide, tokens, state, loops), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_huginn(tmp_path: Path, tokenizer: Path, byte_corpus: Path, shards: int) -> None:
    weights = write_huginn(tmp_path / "huginn", tokenizer, shards)
    (tmp_path / "work").mkdir()
    checkpoint = check_use(tmp_path / "huginn", byte_corpus, tokenizer, tmp_path / "work")
    compare(checkpoint, parity.huginn, weights, parity.HUGINN.state_std)


def run_in(folder: Path, words: list[str], environment: dict[str, str]) -> str:
    """Run a command in a folder; return what it printed to stdout."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 280}
    result = subprocess.run(words, cwd=folder, env=environment, check=False, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_page_run_as_written(tmp_path: Path, tokenizer: Path, tiny_text: Path) -> None:
    """A folder of Huginn's kind goes in, trains ten steps, and comes out; it loads in transformers without this package."""
    section = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8").split("## In, ten steps, and out")[1]
    commands, script = re.findall(r"^```(?:bash|python)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[:2]
    weights = write_huginn(tmp_path / "huginn", tokenizer, shards=2)
    (tmp_path / "text").mkdir()
    for file in sorted(tiny_text.iterdir()):  # in pieces: the few files would leave the validation split empty
        for number, piece in enumerate(re.findall(r".{1,2000}", file.read_text(encoding="utf-8"), re.DOTALL)):
            (tmp_path / "text" / f"{file.stem}-{number}.py").write_text(piece, encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = run_in(tmp_path, ["bash", "-euo", "pipefail", "-c", commands], environment)
    assert "done: 10 steps" in output
    # `-P` leaves the working directory out of the path, and PYTHONPATH may name this repository.
    environment.pop("PYTHONPATH", None)
    script += "\nassert 'megatron_rdt' not in __import__('sys').modules"
    assert run_in(tmp_path, [sys.executable, "-P", "-c", script], environment).startswith("def read(")
    before, (trained, _) = weights["transformer.wte.weight"], load(tmp_path / "exports" / "huginn", "cpu")
    moved = (trained.embedding.weight - before).abs().max()
    assert 0 < float(moved) < 0.1


@pytest.mark.slow
def test_parcae(tmp_path: Path, tokenizer: Path, byte_corpus: Path, vocabulary: int) -> None:
    """Their folder: config.json, and a state dict of torch.save with the tied head and the rotary table in it."""
    weights = small_weights(with_vocabulary(parity.parcae_shapes(), vocabulary))
    folder = tmp_path / "parcae"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(PARCAE | {"padded_vocab_size": vocabulary, "vocab_size": vocabulary})
    )
    extra = {"lm_head.weight": weights["transformer.wte.weight"], "freqs_cis": torch.zeros(1, 4, 1, 2)}
    torch.save({f"_orig_mod.{name}": value for name, value in (weights | extra).items()}, folder / "model.pt")
    with pytest.raises(ConfigError, match="Name the folder of one in --tokenizer"):
        convert(str(folder), str(tmp_path / "none"), "native")
    (tmp_path / "work").mkdir()
    options = ImportOptions(tokenizer=str(tokenizer))
    checkpoint = check_use(folder, byte_corpus, tokenizer, tmp_path / "work", options)
    compare(checkpoint, parity.parcae, weights, parity.PARCAE.state_std)


MYTHOS_FIELDS = {
    **{"max_seq_len": 64, "max_loop_iters": 3, "attn_type": "mla", "n_experts": 8, "rope_theta": 500000.0},
    **{"n_experts_per_tok": 2, "expert_dim": 12, "n_shared_experts": 2, "lora_rank": 3, "act_threshold": 0.99},
    **{"dim": 32, "n_heads": 4, "n_kv_heads": 2, "prelude_layers": 2, "coda_layers": 1, "kv_lora_rank": 12},
    **{"q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}


class MythosConfig:
    """Stands in the pickle for open_mythos.main.MythosConfig, whose name it is given."""


MythosConfig.__module__ = "open_mythos.main"


LATENT_FIELDS = ("kv_rank", "query_rank", "nope_dim", "rope_dim", "value_dim")  # which gqa does not read


def write_mythos_content(attention: str, vocabulary: int) -> tuple[Weights, dict[str, Any]]:
    """Return weights and the content of the checkpoint that OpenMythos' training script saves."""
    record = json.loads(recorded.RECORD.read_text())
    shapes = next(entry["shapes"] for name, entry in record.items() if name.startswith(attention))
    shapes = {name: [vocabulary if size == 61 else size for size in shape] for name, shape in shapes.items()}
    weights = {name: value.float() for name, value in recorded.make_weights(shapes).items()}
    config = MythosConfig()
    vars(config).update(MYTHOS_FIELDS | {"vocab_size": vocabulary, "attn_type": attention})
    return weights, {"model": weights, "step": 7, "cfg": config, "vocab_size": vocabulary}


def save_mythos(content: dict[str, Any], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a checkpoint as OpenMythos' script does, with a config object that is pickled as one of its class."""
    module = types.ModuleType("open_mythos.main")
    module.MythosConfig = MythosConfig  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "open_mythos", types.ModuleType("open_mythos"))
        patch.setitem(sys.modules, "open_mythos.main", module)
        torch.save(content, file)


def test_the_config_in_a_file_of_weights_counts_more_than_one_around_it(
    tmp_path: Path, tokenizer: Path, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config.yaml of something else may lie beside or above the file; what --config names counts more than both."""
    _, content = write_mythos_content("gqa", vocabulary)
    (tmp_path / "inner").mkdir()
    file, options = tmp_path / "inner" / "mythos.pt", ImportOptions(tokenizer=str(tokenizer))
    save_mythos(content, file, monkeypatch)
    for folder in (tmp_path, tmp_path / "inner"):
        (folder / "config.yaml").write_text("model:\n  dim: 64\n")
        plan = plan_import(file, options)
        assert (plan.kind, plan.model.dim, plan.length) == ("OpenMythos", 32, 64)
    named = tmp_path / "named.json"
    named.write_text(json.dumps(vars(content["cfg"]) | {"max_seq_len": 128}))
    assert plan_import(file, dataclasses.replace(options, config=str(named))).length == 128
    with pytest.raises(ConfigError, match=r"--config names .*nothing\.json, which is no file"):
        plan_import(file, dataclasses.replace(options, config=str(tmp_path / "nothing.json")))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_open_mythos(
    attention: str, tmp_path: Path, tokenizer: Path, byte_corpus: Path, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its script's checkpoint holds a pickled config object, of which the fields are read and no code is run."""
    weights, content = write_mythos_content(attention, vocabulary)
    save_mythos(content, tmp_path / "mythos.pt", monkeypatch)
    (tmp_path / "work").mkdir()
    options = ImportOptions(tokenizer=str(tokenizer))
    checkpoint = check_use(tmp_path / "mythos.pt", byte_corpus, tokenizer, tmp_path / "work", options)
    model, _ = load(checkpoint, "cpu")
    # Whose logits tests/parity compares with the package's own.
    expected = dataclasses.replace(recorded.BASE, attention=attention, halting="act", vocab_size=vocabulary)  # type: ignore[arg-type]
    if attention == "gqa":
        expected = dataclasses.replace(expected, **{name: getattr(model.config, name) for name in LATENT_FIELDS})
    assert model.config == expected
    for name, value in from_open_mythos(weights, model.config).items():
        assert torch.equal(model.state_dict()[name], value), name


OURO: dict[str, Any] = {
    **{"model_type": "ouro", "architectures": ["OuroForCausalLM"], "hidden_act": "silu", "hidden_size": 32},
    **{"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": False},
    **{"total_ut_steps": 3, "early_exit_threshold": 1.0, "use_sliding_window": False, "sliding_window": 4096},
    **{"layer_types": ["full_attention"] * 2, "auto_map": {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}},
}


def ouro_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, 32), "model.norm.weight": (32,)}
    shapes |= {"model.early_exit_gate.weight": (1, 32), "model.early_exit_gate.bias": (1,)}
    shapes["lm_head.weight"] = (vocabulary, 32)
    for name in ("model.layers.0", "model.layers.1"):
        norms = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
        shapes |= {f"{name}.{norm}.weight": (32,) for norm in norms}
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (32 if part in "qo" else 16, 32) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (48, 32) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (32, 48)
    return shapes


@pytest.mark.slow
def test_ouro(tmp_path: Path, tokenizer: Path, byte_corpus: Path, vocabulary: int) -> None:
    weights = small_weights(ouro_shapes(vocabulary))
    write_source(tmp_path / "ouro", OURO | {"vocab_size": vocabulary}, weights, tokenizer, shards=2)
    (tmp_path / "work").mkdir()
    checkpoint = check_use(tmp_path / "ouro", byte_corpus, tokenizer, tmp_path / "work")

    def reference(w: Weights, tokens: torch.Tensor, state: None, loops: int) -> torch.Tensor:
        return ouro_logits(w, tokens, loops, layers=2, heads=4, kv_heads=2, base=1e4)

    compare(checkpoint, reference, weights)
    model, _ = load(checkpoint, "cpu")
    gate = weights["model.early_exit_gate.weight"][0], weights["model.early_exit_gate.bias"]
    assert torch.equal(model.core.halting.weight, gate[0])
    assert torch.equal(model.core.halting.bias, gate[1])


def test_a_cut_of_a_looped_model_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    """It would change nothing: the model is looped already."""
    write_huginn(tmp_path / "huginn", tokenizer)
    check_cut_is_refused(tmp_path / "huginn", tmp_path / "out", "Huginn")


def test_the_mapping_is_printed(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_huginn(tmp_path / "huginn", tokenizer)
    assert command([str(tmp_path / "huginn"), str(tmp_path / "out"), "--to", "native", "--dry_run", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("huginn: Huginn")
    query = "prelude.0.attention.query.weight [48, 48] <- transformer.prelude.0.attn.Wqkv.weight (rows 0 to 47)"
    assert query in lines
    plan = plan_import(tmp_path / "huginn", ImportOptions())
    assert lines[1:] == describe_rules(plan)
    assert len(lines) - 1 == len(plan.stored.shapes)
    assert not (tmp_path / "out").exists()


def test_the_weights_pass_through_memory_one_by_one(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are written, no more of the source is alive than what the largest weight is made of, twice."""
    weights = write_huginn(tmp_path / "huginn", tokenizer, shards=2)
    plan, alive, peak = plan_import(tmp_path / "huginn", ImportOptions()), {}, []

    def read(name: str) -> torch.Tensor:
        value = plan.weights.read(name).clone()
        alive[id(value)] = value.nbytes
        weakref.finalize(value, alive.pop, id(value))
        peak.append(sum(alive.values()))
        return value

    watched = dataclasses.replace(plan, weights=dataclasses.replace(plan.weights, read=read))
    written = write_weights(tmp_path, watched.stored.shapes, set(), watched.stored.read, lambda size: None)
    assert set(written) == set(plan.rules)
    assert len(peak) >= len(weights)
    largest = max(weight.nbytes for weight in weights.values())
    assert max(peak) <= 2 * largest < sum(weight.nbytes for weight in weights.values()) / 2
