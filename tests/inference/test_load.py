"""Loading checkpoints and exports: equal models, and messages for damaged or wrong ones, also of `rdt generate`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_rdt
from data_prep.config import PrepConfig
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer
from launch.cli import run_command
from megatron_rdt.config import RunConfig
from megatron_rdt.convert import convert
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.inference import load
from megatron_rdt.train.trainer import train

USAGE, FAILED = 2, 1


@pytest.fixture(scope="module")
def run(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loaded")
    assert train(configure(f"--run.root={root}", "--train.steps=2", "--eval.every=0")) == 0
    return root / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return convert(str(run), str(run.parent / "exports" / "run"), "hf")


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


def test_an_export_is_the_checkpoint(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model, tokenizer), (again, tokenizer_again) = load(run), megatron_rdt.load(exported)
    tokens = torch.tensor([tokenizer.encode("def main(")])
    assert tokenizer_again.encode("def main(") == tokens[0].tolist()
    with torch.no_grad():
        assert all(torch.equal(model(tokens, loops), again(tokens, loops)) for loops in (1, 5))
    texts = []
    for source in (run, exported):
        assert run_command(["generate", str(source), "--tokens=8", "--loops=3", "--prompt=def "]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")


def test_another_tokenizer_in_an_export(export: Path, run: Path, tmp_path: Path) -> None:
    """A tokenizer of the same size is refused: every id exists in it, but the text would be nonsense."""
    assert (export / "model.safetensors").stat().st_mode == (export / "config.json").stat().st_mode
    texts = [path.read_text() for path in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    other = train_tokenizer(texts, PrepConfig(vocab_size=512))
    (export / "tokenizer.model").write_bytes(other)
    with pytest.raises(CheckpointError, match="is not the one that the model was trained with"):
        load(export)
    with pytest.raises(CheckpointError, match="is not the one that the model was trained with"):
        convert(str(export), str(tmp_path / "out"), "hf")


def test_damaged_exports_are_named(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    config = json.loads((export / "config.json").read_text())

    def refuse(text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            load(export)

    name = next(name for name in weights if "embedding" in name)
    save_file({**weights, name: weights[name][:-1].clone()}, export / "model.safetensors")
    refuse(r"does not fit its own config: \['embedding")
    save_file({k: v for k, v in weights.items() if k != name}, export / "model.safetensors")
    refuse(r"does not fit its own config: \['embedding")
    (export / "model.safetensors").write_bytes(b"damaged")
    refuse(r"model\.safetensors is damaged")
    for content in ({**config, "model_type": "llama"}, [], {}, {**config, "model": {"depth": 3}}):
        (export / "config.json").write_text(json.dumps(content))
        refuse("llama" if content and "llama" in json.dumps(content) else "not the config of an export")
    (export / "config.json").write_text("{")
    refuse("not the config of an export")


def test_weights_kept_in_half_precision_are_widened(export: Path, exported: Path) -> None:
    weights = load_file(export / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, export / "model.safetensors")
    narrow, whole = load(export)[0], load(exported)[0]
    for (name, parameter), (_, expected) in zip(narrow.named_parameters(), whole.named_parameters(), strict=True):
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, expected.bfloat16().float()), name


@pytest.mark.parametrize(
    ("device", "text"), [("foo", "no device 'foo'"), ("", "no device"), ("meta", "meta cannot"), ("mps", "cannot")]
)
def test_unknown_devices_are_named(device: str, text: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        load(run, device)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there is such a device")
def test_an_absent_gpu_is_named(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda:7 cannot be used here; PyTorch sees \d CUDA devices?\."):
        load(run, "cuda:7")
    assert next(load(run, torch.device("cpu"))[0].parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--device=foo"], USAGE, "no device 'foo'"),
        (["--device=cuda:77"], USAGE, "cuda:77 cannot be used here"),
        (
            ["--seed=99999999999999999999"],
            USAGE,
            "--seed is 99999999999999999999, it must be a whole number from -9223",
        ),
        (["--temperature=.nan"], USAGE, "--temperature is nan, it must be a finite number"),
        (["--prompt=a\udcff"], USAGE, "--prompt=a\\xff is not valid UTF-8"),
        (["--prompt="], USAGE, "the prompt is empty"),
    ],
)
def test_generate_refuses_wrong_options(
    words: list[str], status: int, text: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["generate", str(run), *words]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("rdt generate: error: ")
    assert text in captured.err
    assert captured.out == ""


def test_a_file_and_an_absent_path_have_different_messages(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", str(run / "config.yaml")]) == FAILED
    assert f"{run / 'config.yaml'} is a file. Name a run" in capsys.readouterr().err
    assert run_command(["generate", str(run / "absent")]) == FAILED
    assert "absent does not exist" in capsys.readouterr().err
