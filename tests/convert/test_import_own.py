"""This project's own weights in others' formats become checkpoints again: exports, DeepSpeed's universal and merged files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.commands.convert import convert as command
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.origin import write_origin
from megatron_rdt.config import RunConfig
from megatron_rdt.convert import convert
from megatron_rdt.convert.hf import ExportOptions
from megatron_rdt.convert.recognize import ImportOptions, plan_import
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.parallel.zero_universal import write_universal
from megatron_rdt.train.trainer import train
from tests.convert.imported import check_cut_is_refused, check_use


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


def save_again(folder: Path, out: Path) -> None:
    """Save an export as transformers does, in bfloat16 and in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(out)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole", "sharded", "bfloat16", "saved again"])
def test_an_export_comes_back(tmp_path: Path, finished: Path, tiny_corpus: Path, form: str) -> None:
    """An export in one file or several, rounded, or saved again by transformers, is a checkpoint again."""
    options = {
        "sharded": ExportOptions(shard_size="100KB"),
        "bfloat16": ExportOptions("bfloat16", "50KB"),
    }.get(form)
    exported = convert(str(finished), str(tmp_path / "hf"), "hf", export=options)
    importing = None
    if form == "saved again":
        save_again(exported, tmp_path / "again")
        original, exported = exported, tmp_path / "again"
        with pytest.raises(CheckpointError, match=r"not the one .* the original in --tokenizer"):
            convert(str(exported), str(tmp_path / "out"), "native")
        importing = ImportOptions(tokenizer=str(original))
    several = len(list(exported.glob("model-*.safetensors"))) > 1
    assert several == (exported / "model.safetensors.index.json").is_file() == (form != "whole")
    (tmp_path / "work").mkdir()
    checkpoint = check_use(exported, tiny_corpus, tiny_corpus / "tokenizer", tmp_path / "work", importing)
    before, after = checkpoints.read_model_weights(latest(finished)), checkpoints.read_model_weights(checkpoint)
    assert before.keys() == after.keys()
    is_rounded = form in ("bfloat16", "saved again")
    for name, value in before.items():
        assert torch.equal(after[name], value.bfloat16().float() if is_rounded else value), name


def test_a_run_begins_with_a_sharded_export(
    tmp_path: Path, finished: Path, configure: Callable[..., RunConfig]
) -> None:
    exported = convert(str(finished), str(tmp_path / "hf"), "hf", export=ExportOptions(shard_size="100KB"))
    options = (f"--run.root={tmp_path}", "--run.name=next", "--train.steps=2", "--eval.every=0")
    assert train(configure(*options), init=str(exported)) == 0
    origin = checkpoints.read_origin(tmp_path / "next")
    assert origin is not None
    identity = origin["weights_sha256"]
    weights = load_file(next(iter(sorted(exported.glob("*.safetensors")))))
    save_file({name: value + 1 for name, value in weights.items()}, next(iter(sorted(exported.glob("*.safetensors")))))
    assert write_origin(tmp_path / "next", checkpoints.Start(exported, True))["weights_sha256"] != identity


def test_an_out_inside_of_its_source_is_refused(tmp_path: Path, finished: Path) -> None:
    """A checkpoint that has other files than its manifest lists is refused from then on."""
    exported = convert(str(finished), str(tmp_path / "hf"), "hf")
    before = {source: sorted(source.rglob("*")) for source in (finished, exported)}
    for source, out in (
        (latest(finished), latest(finished) / "hf"),
        (finished, latest(finished) / "new" / "hf"),
        (finished, finished / "checkpoints" / "hf"),
        (exported, exported / "native"),
    ):
        with pytest.raises(ConfigError, match=r"OUT .* lies in .* Choose a path outside of it"):
            convert(str(source), str(out), "hf")
    assert before == {source: sorted(source.rglob("*")) for source in (finished, exported)}


def test_a_folder_without_weights_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"notes holds no run, no checkpoint and no weights of another model"):
        convert(str(tmp_path / "notes"), str(tmp_path / "out"), "native")


def test_what_an_exports_config_says_of_calls(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loop counts that are none are refused, and an exit rule, which a checkpoint cannot keep, is named."""
    exported = convert(str(finished), str(tmp_path / "hf"), "hf")
    settings = json.loads((exported / "config.json").read_text())
    wrong = (("8", "loops is '8', not a number"), (0, "loops is 0; it must be from 1"), (True, "loops is True"))
    for loops, message in wrong:
        (exported / "config.json").write_text(json.dumps(settings | {"loops": loops}))
        with pytest.raises(CheckpointError, match=message):
            plan_import(exported, ImportOptions())
    (exported / "config.json").write_text(json.dumps(settings | {"exit": "change", "exit_threshold": 0.1}))
    assert command([str(exported), str(tmp_path / "out"), "--dry_run"]) == 0
    assert "exit 'change' in its config is a setting of calls" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["", "5", "GB", "5 bytes", "-1GB", "nanGB", "0MB", "infTB"])
def test_a_shard_size_is_a_number_with_its_unit(size: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shard_size is .* such as 5GB"):
        convert(str(tmp_path), str(tmp_path / "out"), "hf", export=ExportOptions(shard_size=size))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rdt.convert import hf_export

    name, value = "prelude.0.feedforward.down.weight", float("nan")
    opened = checkpoints.open_weights(latest(finished))

    def read(wanted: str) -> torch.Tensor:
        tensor = opened.read(wanted)
        if wanted == name:
            tensor[0, 1] = value
        return tensor

    monkeypatch.setattr(hf_export, "open_weights", lambda *_: checkpoints.StoredWeights(opened.shapes, read))
    with pytest.raises(CheckpointError, match=rf"{name} holds 1 numbers that are not finite, the first at \[0, 1\]"):
        convert(str(finished), str(tmp_path / "hf"), "hf")
    value = 3.4e38  # of float32 alone
    with pytest.raises(CheckpointError, match="bfloat16 cannot hold them; export float32"):
        convert(str(finished), str(tmp_path / "hf"), "hf", export=ExportOptions("bfloat16"))
    assert list(tmp_path.iterdir()) == []


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
