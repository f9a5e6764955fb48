"""Facts of a source's training, such as its length, go into the checkpoint and into an export of it."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import ModelConfig, RunConfig, load_config
from megatron_rdt.convert import convert
from megatron_rdt.convert.hf_config import RdtConfig
from megatron_rdt.convert.recognize import ImportOptions, plan_import
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError
from megatron_rdt.train.trainer import train
from tests.convert.test_import_dense import SIZES, write_dense

CUT = ImportOptions("2,3,1")
TRAINED_LENGTH = 48


def read_lengths(exported: Path) -> tuple[int, int]:
    """Return the lengths that the config and the tokenizer of an export declare."""
    settings, tokenizer = (
        json.loads((exported / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    return settings["max_position_embeddings"], tokenizer["model_max_length"]


@pytest.fixture(scope="module")
def finished(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps with sequences of another length than the default."""
    root = tmp_path_factory.mktemp("finished")
    words = (f"--run.root={root}", "--run.name=first", "--train.steps=2", "--eval.every=0")
    assert train(configure(*words, f"--train.sequence_length={TRAINED_LENGTH}")) == 0
    return root / "first"


@pytest.mark.parametrize("length", [64, 131_072])
def test_an_export_of_a_dense_model_declares_its_length(
    length: int, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    config = LlamaConfig(**SIZES | {"max_position_embeddings": length})
    _, source = write_dense(tmp_path / "saved", config, tokenizer_folders["hf"])
    assert read_lengths(convert(str(source), str(tmp_path / "hf"), "hf", CUT)) == (length, length)
    checkpoint = convert(str(source), str(tmp_path / "native"), "native", CUT)
    assert load_config(checkpoint / "config.yaml").train.sequence_length == length
    assert read_lengths(convert(str(checkpoint), str(tmp_path / "again"), "hf")) == (length, length)


def test_an_export_that_comes_back_keeps_its_length(tmp_path: Path, finished: Path) -> None:
    exported = convert(str(finished), str(tmp_path / "hf"), "hf")
    again = convert(str(exported), str(tmp_path / "again"), "hf")
    assert read_lengths(exported) == read_lengths(again) == (TRAINED_LENGTH, TRAINED_LENGTH)


def test_deepspeeds_weights_have_the_length_of_their_run(tmp_path: Path, finished: Path, tiny_corpus: Path) -> None:
    checkpoint = checkpoints.list_complete_checkpoints(finished)[-1]
    (tmp_path / "source").mkdir()
    torch.save(checkpoints.read_model_weights(checkpoint), tmp_path / "source" / "pytorch_model.bin")
    options = ImportOptions(tokenizer=str(tiny_corpus / "tokenizer"), config=str(checkpoint / "config.yaml"))
    exported = convert(str(tmp_path / "source"), str(tmp_path / "hf"), "hf", options)
    assert read_lengths(exported) == (TRAINED_LENGTH, TRAINED_LENGTH)


KILLED = """
import os, signal, sys
import megatron_rdt.convert.hf_export
from megatron_rdt.convert import convert
from megatron_rdt.convert.recognize import ImportOptions
megatron_rdt.convert.hf_export.export_hf = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], "hf", ImportOptions("2,3,1"))
"""


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("to", ["hf", "native"])
def test_the_next_conversion_removes_what_a_killed_one_left(
    to: str, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    """The whole checkpoint from which an export is made lies beside OUT for a time."""
    _, source = write_dense(tmp_path / "saved", LlamaConfig(**SIZES), tokenizer_folders["hf"])
    out = tmp_path / "work" / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert (out.parent / ".out.tmp.native" / "manifest.json").is_file()
    convert(str(source), str(out), to, CUT)
    assert sorted(file.name for file in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("attention_dim", [0, 64])
def test_the_head_dim_of_an_export_is_the_models(attention_dim: int) -> None:
    """Tools size caches by it; heads may be wider than dim / heads, as in Qwen3."""
    model = ModelConfig(dim=32, heads=4, kv_heads=2, attention_dim=attention_dim)
    assert RdtConfig(dataclasses.asdict(model)).head_dim == model.head_dim == (attention_dim or 32) // 4


def read_bos(exported: Path) -> list[Any]:
    """Return BOS in each file of an export that can declare it: ids, and the token of the tokenizer's settings."""
    names = (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    )  # the last one where transformers has one
    files = [exported / name for name in names]
    config, generation, tokenizer = (json.loads(file.read_text()) if file.is_file() else {} for file in files)
    return [config["bos_token_id"], generation["bos_token_id"], tokenizer.get("bos_token")]


@pytest.mark.parametrize("saved_again", [False, True])
def test_an_export_without_bos_comes_back_without_it(saved_again: bool, tmp_path: Path, finished: Path) -> None:
    """Also one that transformers saved again, which leaves out a null."""
    exported = convert(str(finished), str(tmp_path / "hf"), "hf")
    assert read_bos(exported) == [None, None, None]
    if saved_again:
        settings = json.loads((exported / "config.json").read_text())
        del settings["bos_token_id"]
        (exported / "config.json").write_text(json.dumps(settings))
    checkpoint = convert(str(exported), str(tmp_path / "native"), "native")
    assert Tokenizer(checkpoint / "tokenizer").bos >= 0  # which would be declared
    assert read_bos(convert(str(checkpoint), str(tmp_path / "again"), "hf")) == [None, None, None]
    assert read_bos(convert(str(exported), str(tmp_path / "at-once"), "hf")) == [None, None, None]


@pytest.mark.parametrize("bos", [1, None, "missing"])
def test_bos_of_a_dense_model_with_sentencepiece_alone_is_that_of_its_config(
    bos: Any, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    _, source = write_dense(tmp_path / "saved", LlamaConfig(**SIZES), tokenizer_folders["bpe"])
    (source / "tokenizer.json").unlink()  # whose template would say it
    settings = json.loads((source / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if name != "bos_token_id"}
    settings |= {} if bos == "missing" else {"bos_token_id": bos}
    (source / "config.json").write_text(json.dumps(settings))
    checkpoint = convert(str(source), str(tmp_path / "native"), "native", CUT)
    recorded = {1: True, None: False, "missing": None}[bos]
    state = checkpoints.read_trainer_state(checkpoint)
    assert state.get("begins_with_bos") is recorded
    assert "data" not in state  # by which a run would resume
    own = Tokenizer(checkpoint / "tokenizer").bos
    exported = convert(str(checkpoint), str(tmp_path / "hf"), "hf")
    assert read_bos(exported)[:2] == [None if bos is None else own] * 2


def test_a_length_that_is_none_is_refused_and_a_missing_one_is_said(
    tmp_path: Path, tokenizer_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = write_dense(tmp_path / "saved", LlamaConfig(**SIZES), tokenizer_folders["hf"])
    settings = json.loads((source / "config.json").read_text())
    for wrong, message in (
        ("long", "is 'long', not a number"),
        (0, "is 0; it must be from 1"),
        (1 << 40, "is 1099511627776;"),
    ):
        (source / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": wrong}))
        with pytest.raises(CheckpointError, match=message):
            plan_import(source, CUT)
    del settings["max_position_embeddings"]
    (source / "config.json").write_text(json.dumps(settings))
    convert(str(source), str(tmp_path / "out"), "native", CUT)
    assert "does not say how long sequences in its training were" in capsys.readouterr().out
