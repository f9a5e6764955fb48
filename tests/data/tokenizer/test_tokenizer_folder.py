"""Folders with a tokenizer: what decides its ids, files that are no tokenizer, and files that contradict each other."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import DataError

END = {"bpe": "</s>", "hf": "<|end|>"}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}}, True),
        ({"post_processor": None}, True),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"pre_tokenizer": None}, False),
    ],
)
def test_a_fingerprint_is_of_what_decides_the_ids(
    change: dict, same: bool, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    given = Tokenizer(tokenizer_folders["hf"])
    folder = Path(shutil.copytree(tokenizer_folders["hf"], tmp_path / "hf"))
    document = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(document, indent=3))
    changed = Tokenizer(folder / "tokenizer.json")
    assert (changed.fingerprint == given.fingerprint) == same
    text = "def f(x): return X\n"
    assert (changed.encode(text) == given.encode(text)) == same


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "does not exist. Name a folder with a tokenizer.model"),
        ("tokenizer.json", "{", "cannot be read as JSON"),
        ("tokenizer.json", "{}", "describes no model"),
        ("tokenizer.json", '{"model": {}}', "is not a tokenizer.json of the library tokenizers"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<eos>"}', "name the token '<eos>', which is not in tokenizer.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"513": {"content": "<x>"}}}', "name the token '<x>'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<x>"]}', "no JSON object under added_tokens_decoder"),
        ("added_tokens.json", '{"<x>": 513}', "name the token '<x>', which is not in tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(
    file: str, content: str | None, message: str, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tokenizer_folders["hf"], tmp_path / "hf"))
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        Tokenizer(folder)


def test_random_ids_are_refused(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    document = json.loads((tokenizer_folders["hf"] / "tokenizer.json").read_text())
    document["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="dropout"):
        Tokenizer(tmp_path)


def update_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file, which may be missing."""
    document = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**document, **changes}))


def test_a_folder_with_two_tokenizers_that_differ_says_which_is_used(
    tokenizer_folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tokenizer_folders["bpe"], tmp_path / "both"))
    assert Tokenizer(folder).kind == "spm-bpe"
    assert caplog.messages == [], "both give the same ids"
    other = Path(shutil.copytree(tokenizer_folders["bpe"], tmp_path / "other"))
    shutil.copyfile(tokenizer_folders["unigram"] / "tokenizer.json", other / "tokenizer.json")
    for _ in range(2):
        assert Tokenizer(other).kind == "spm-bpe"
    assert len(caplog.messages) == 1, "once per process"
    message = rf"the files in {other} contradict each other: .* in tokenizer\.json,? and .* in tokenizer\.model\. "
    message += rf"tokenizer\.model is used; to use the other, name {other}/tokenizer\.json"
    assert re.fullmatch(message, caplog.messages[0])
    caplog.clear()
    assert Tokenizer(other / "tokenizer.json").kind == "hf"
    assert Tokenizer(other / "tokenizer.model").kind == "spm-bpe"
    assert caplog.messages == [], "a file that is named is meant"


@pytest.mark.parametrize(
    ("kind", "file", "changes", "message"),
    [
        ("bpe", "tokenizer.json", {"model": 1}, r"tokenizer\.json cannot be loaded .*\. tokenizer\.model is used"),
        (
            "bpe",
            "tokenizer_config.json",
            {"eos_token": "<pad>"},
            r"eos_token is '<pad>' .* '</s>' in tokenizer\.model, which",
        ),
        ("bpe", "added_tokens.json", None, r"added_tokens\.json cannot be read as JSON .* tokenizer\.model is used"),
        (
            "hf",
            "tokenizer_config.json",
            {"eos_token": "<|pad|>"},
            r"eos_token is '<\|end\|>' in special_tokens_map\.json and '<\|pad\|>' in tokenizer_config\.json; .* is used",
        ),
        (
            "hf",
            "tokenizer_config.json",
            {"added_tokens_decoder": {"7": {"content": "<|pad|>"}}},
            r"'<\|pad\|>' has the id 7 in the settings and 1 in tokenizer\.json, which is used",
        ),
        (
            "hf",
            "added_tokens.json",
            {"<|pad|>": 3},
            r"'<\|pad\|>' has the id 3 in the settings and 1 in tokenizer\.json",
        ),
    ],
)
def test_files_that_contradict_the_tokenizer_are_named(
    kind: str,
    file: str,
    changes: dict | None,
    message: str,
    tokenizer_folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(tokenizer_folders[kind], tmp_path / kind))
    if changes is None:
        (folder / file).write_text("{")
    else:
        update_json(folder / file, **changes)
    tokenizer = Tokenizer(folder)
    assert len(caplog.messages) == 1
    assert re.search(message, caplog.messages[0])
    expected = tokenizer.token_id("<|pad|>") if changes == {"eos_token": "<|pad|>"} else tokenizer.token_id(END[kind])
    assert tokenizer.eos == expected
