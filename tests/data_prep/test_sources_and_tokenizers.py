"""Prep from Hugging Face datasets, and with an existing tokenizer."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.sentencepiece_backend import parse_model
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import read_files, read_texts

OPTIONS = {"vocab_size": 512, "valid_fraction": 0.2, "workers": 1}


def test_hugging_face_dataset_from_a_local_path(tiny_text: Path, tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(tiny_text.glob("*.py"))]
    texts = [text for text in texts if text.strip()]
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = [json.dumps({"body": text, "other": i}) + "\n" for i, text in enumerate(texts)]
    (folder / "part.jsonl").write_text("".join(lines))
    source = f"hf:{folder}"
    out = prepare(PrepConfig(sources=[source], out=str(tmp_path / "out"), text_field="body", **OPTIONS))
    assert read_texts(out) == set(texts)
    missing = PrepConfig(sources=[f"hf:{tmp_path / 'nowhere'}"], out=str(tmp_path / "none"), **OPTIONS)
    with pytest.raises(DataError, match="could not be read as a dataset"):
        prepare(missing)
    assert not (tmp_path / "none").exists()


def test_an_existing_tokenizer_is_used(tiny_text: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "tokenizer": str(tiny_corpus / "tokenizer")}
    out = prepare(PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "again"), **options))
    assert Tokenizer(out / "tokenizer").fingerprint == Tokenizer(tiny_corpus / "tokenizer").fingerprint
    assert read_files(out)["train/shard-00000.bin"] == read_files(tiny_corpus)["train/shard-00000.bin"]


def test_an_existing_tokenizer_that_has_been_replaced(
    tiny_text: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corpus is not up to date if the tokenizer that it was made with has been replaced."""
    given = tmp_path / "given"
    shutil.copytree(tiny_corpus / "tokenizer", given)
    config = PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "out"), tokenizer=str(given), **OPTIONS)
    prepare(config)
    (given / "tokenizer.json").unlink()  # the same ids
    prepare(config)
    assert "nothing to do" in capsys.readouterr().out
    model = parse_model((given / "tokenizer.model").read_bytes())
    model.pieces[-1].piece = "\u6f22"
    (given / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match=r"another tokenizer than .*given is now\. Use a new --out"):
        prepare(config)
