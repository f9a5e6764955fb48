"""Validation that has the text of training under another name."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep.pipeline import prepare
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import ConfigError
from tests.data_prep.small_corpora import RECORDS, make_config, read_split_texts, write_lines


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", list(RECORDS))


def test_a_copy_of_the_training_text_is_refused(source: Path, tmp_path: Path) -> None:
    """With duplicates kept the validation loss would be that of training text; without, nothing is left to train on."""
    copy, other = tmp_path / "copy.jsonl", write_lines(tmp_path / "b.jsonl", RECORDS[:20])
    shutil.copyfile(source, copy)
    before = sorted(os.listdir(tmp_path))
    sources = {"sources": [str(other), str(source)], "valid_sources": [str(copy)]}
    with pytest.raises(
        ConfigError, match=r"copy\.jsonl in valid_sources and a\.jsonl in sources have the same content"
    ):
        prepare(make_config(source, tmp_path / "out", dedup="none", **sources))
    for options in ({}, {"dedup": "near"}, {"max_documents": 1000}):
        with pytest.raises(
            ConfigError, match=r"the train split would be empty: all \d+ documents of sources are in valid"
        ):
            prepare(make_config(source, tmp_path / "out", **sources, **options))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_hard_link_to_the_training_text_is_refused(source: Path, tmp_path: Path) -> None:
    os.link(source, tmp_path / "hard.jsonl")
    with pytest.raises(ConfigError, match=r"a\.jsonl, the same as .*hard\.jsonl, is in sources and in valid_sources"):
        prepare(make_config(source, tmp_path / "out", valid_sources=[str(tmp_path / "hard.jsonl")]))


def test_a_copy_among_other_text_is_validation_only(source: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "b.jsonl", [json.dumps({"text": f"another {i}"}) for i in range(60)])
    copy = Path(shutil.copyfile(source, tmp_path / "copy.jsonl"))
    sources = {"sources": [str(source), str(other)], "valid_sources": [str(copy)]}
    out = prepare(make_config(source, tmp_path / "out", vocab_size=290, **sources))
    assert sorted(read_split_texts(out, "train")) == sorted(f"another {i}" for i in range(60))
    assert load_manifest(out).document["dropped"] == {"duplicate": 60}


def test_empty_files_are_not_the_same_text(source: Path, tmp_path: Path) -> None:
    for name in ("e.jsonl", "f.jsonl"):
        (tmp_path / name).write_text("")
    other = write_lines(tmp_path / "b.jsonl", [json.dumps({"text": f"another {i}"}) for i in range(9)])
    prepare(
        make_config(
            source,
            tmp_path / "out",
            dedup="none",
            sources=[str(source), str(tmp_path / "e.jsonl")],
            valid_sources=[str(other), str(tmp_path / "f.jsonl")],
        )
    )
