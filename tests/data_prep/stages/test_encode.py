"""Encoding: errors name the document that they are about."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.pipeline import prepare
from data_prep.stages import encode
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import DataError
from tests.data_prep.small_corpora import RECORDS, make_config, write_lines


def test_an_id_outside_the_vocabulary_names_its_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", list(RECORDS))
    encoded = Tokenizer.encode_batch

    def encode_with_a_large_id(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        arrays = encoded(tokenizer, texts)
        return [np.array([1, 70000], np.int32) if "document 8 " in t else a for t, a in zip(texts, arrays)]

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_with_a_large_id)
    with pytest.raises(DataError, match=r"document .*a\.jsonl:9 has id 70000 but vocab_size is 320"):
        prepare(make_config(source, tmp_path / "out", part_bytes=100))


def test_a_document_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_SEQUENCE", 200)
    source = write_lines(tmp_path / "a.jsonl", [*RECORDS, json.dumps({"text": "word " * 2000})])
    with pytest.raises(DataError, match=r"document .*a\.jsonl:61 has \d+ tokens, more than 200\. Split it"):
        prepare(make_config(source, tmp_path / "out", valid_fraction=0.0))
