"""Fixtures of several tests of the data."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.corpora import draw_documents, write_corpus


@pytest.fixture(scope="session")
def corpora(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three corpora with one tokenizer and disjoint ids: code below 200, math from 200 to 300, web from 300 on."""
    folder, generator = tmp_path_factory.mktemp("corpora"), np.random.default_rng(4)
    paths = {}
    for name, low, high, tokens in (("code", 4, 200, 9000), ("math", 200, 300, 4000), ("web", 300, 500, 2000)):
        shards = [draw_documents(generator, part, low, high) for part in (tokens // 2, tokens // 4, tokens // 4)]
        valid = [draw_documents(generator, 1000, low, high)]
        paths[name] = write_corpus(folder / name, tiny_corpus, shards, valid)
    return paths
