"""Prep from Hugging Face datasets, and with an existing tokenizer."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep import pipeline
from data_prep.config import PrepConfig
from data_prep.jobs import working_directory
from data_prep.jobs.working_directory import hash_code
from data_prep.pipeline import prepare
from megatron_rdt.data import Tokenizer, load_manifest
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


def test_a_dataset_of_files_with_other_columns_says_which(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, column in (("a", "text"), ("b", "content")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["some words"] * 9}), folder / f"{name}.parquet")
    with pytest.raises(DataError, match=r"could not be read as a dataset: Couldn't cast content: string .*names don't"):
        prepare(PrepConfig(sources=[f"hf:{folder}"], out=str(tmp_path / "out"), **OPTIONS))


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


@pytest.mark.parametrize("kind", ["bpe", "hf"])
def test_only_the_files_of_a_tokenizer_count(
    kind: str,
    tiny_text: Path,
    tokenizer_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the folder of a model: its weights are never read, and a README that is added does not stop a resume."""
    given = Path(shutil.copytree(tokenizer_folders[kind], tmp_path / "model"))
    plain = hash_code(PrepConfig(tokenizer=str(given)))
    (given / "model.safetensors").write_bytes(b"weights")
    (given / "config.json").write_text("{}")
    read, hash_file = list[str](), working_directory.sha256_of
    monkeypatch.setattr(working_directory, "sha256_of", lambda path: read.append(path.name) or hash_file(path))
    config = PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "out"), tokenizer=str(given), **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert read
    assert set(read) == {path.name for path in tokenizer_folders[kind].iterdir()}
    (given / "README.md").write_text("about the model")
    monkeypatch.setattr(pipeline, "scan_part", lambda *_: pytest.fail("scanned again"))
    manifest = load_manifest(prepare(config)).document
    assert manifest["prep"]["code"] == plain
    assert not {"model.safetensors", "config.json", "README.md"} & set(manifest["tokenizer"]["files"])


def test_a_changed_setting_of_a_tokenizer_counts(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where its tokenizer.json is named: the settings in the same folder name EOS."""
    given = Path(shutil.copytree(tokenizer_folders["hf"], tmp_path / "model"))
    for path in (given, given / "tokenizer.json"):
        before = hash_code(PrepConfig(tokenizer=str(path)))
        settings = json.loads((given / "special_tokens_map.json").read_text())
        (given / "special_tokens_map.json").write_text(json.dumps({**settings, "other": str(path)}))
        assert hash_code(PrepConfig(tokenizer=str(path)))["tokenizer"] != before["tokenizer"]


def test_a_tokenizer_without_eos_is_refused_before_the_scan(
    tiny_text: Path, tokenizer_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(tokenizer_folders["hf"] / "tokenizer.json", tmp_path / "tokenizer.json")
    monkeypatch.setattr(pipeline, "scan_part", lambda *_: pytest.fail("began to work"))
    config = PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "out"), tokenizer=str(tmp_path), **OPTIONS)
    with pytest.raises(ConfigError, match="has no EOS"):
        prepare(config)
