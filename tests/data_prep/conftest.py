"""Text for preps that are disturbed, and the corpus that an undisturbed one makes of it."""

import json
import random
from pathlib import Path

import pytest

from data_prep.pipeline import prepare
from tests.data_prep.killed_preps import config
from tests.data_prep.small_corpora import write_lines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 300 documents, 20 of them twice."""
    draw = random.Random(3)
    words = ["loop", "depth", "token", "model", "train", "shard", "window", "corpus", "tensor", "prefix"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(5, 60))) + f" {i}" for i in range(300)]
    path = tmp_path_factory.mktemp("resume") / "a.jsonl"
    return write_lines(path, [json.dumps({"text": text}) for text in [*texts, *texts[:20]]])


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus that an undisturbed prep makes."""
    return prepare(config(source, tmp_path_factory.mktemp("straight") / "out"))
