"""Writing corpora of given documents, with the tokenizer of another corpus, and reading them plainly."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_rdt.data import CorpusManifest, IndexedWriter, load_manifest
from megatron_rdt.data.shard_files.block_hashes import hash_shard
from megatron_rdt.data.shard_files.side_files import EXAMPLE
from megatron_rdt.files import sha256_of

Documents = Sequence[np.ndarray]


def write_shard(folder: Path, name: str, documents: Documents, vocab_size: int) -> dict:
    """Write one shard; return its record for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder / name, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    path = folder / name
    return {
        "name": name,
        "tokens": int(sum(map(len, documents))),
        "documents": len(documents),
        "text_bytes": 0,
        "max_id": int(max(map(np.max, documents))),
        "bin_bytes": path.with_suffix(".bin").stat().st_size,
        "bin_sha256": sha256_of(path.with_suffix(".bin")),
        "idx_sha256": sha256_of(path.with_suffix(".idx")),
    }


def write_corpus(directory: Path, like: Path, train: Sequence[Documents], valid: Sequence[Documents]) -> Path:
    """Write a corpus of the given shards, each a list of documents, with the tokenizer of the corpus `like`."""
    document = json.loads((like / "manifest.json").read_text())
    shutil.copytree(like / "tokenizer", directory / "tokenizer")
    for split, shards in (("train", train), ("valid", valid)):
        records = [
            write_shard(directory / split, f"shard-{number:05d}", documents, document["vocab_size"])
            for number, documents in enumerate(shards)
        ]
        totals = {key: sum(record[key] for record in records) for key in ("tokens", "documents", "text_bytes")}
        document["splits"][split] = {**totals, "shards": records}
    (directory / "manifest.json").write_text(json.dumps(document))
    return directory


def draw_documents(generator: np.random.Generator, tokens: int, low: int = 4, high: int = 500) -> list[np.ndarray]:
    """Draw documents of random length and ids from `low` to below `high`, each ending with EOS (2), `tokens` in all."""
    documents, left = [], tokens
    while left > 0:
        length = min(left, int(generator.integers(1, 90)))
        documents.append(np.append(generator.integers(low, high, length - 1), 2))
        left -= length
    return documents


def read_stream(manifest: CorpusManifest | Path, split: str = "train") -> np.ndarray:
    """Read all tokens of a split, without the code under test."""
    manifest = load_manifest(manifest) if isinstance(manifest, Path) else manifest
    files = [prefix.with_suffix(".bin") for prefix in manifest.shard_prefixes(split)]
    return np.concatenate([np.fromfile(file, "<u2") for file in files]).astype(np.int64)


def mixture_option(corpora: dict[str, Path], **weights: float) -> str:
    """Format the option that trains on some of `corpora` with these weights."""
    return "--data.mixture=" + json.dumps([{"path": str(corpora[n]), "weight": w} for n, w in weights.items()])


class ExampleDocument(NamedTuple):
    """A document of an example: its tokens, with the label of each column and whether it counts."""

    tokens: list[int]
    labels: list[int]
    mask: list[int]
    task: int
    difficulty: int
    answer: int


def write_example_corpus(
    directory: Path, like: Path, splits: dict[str, list[list[ExampleDocument]]], tasks: list[str], labels: bool = True
) -> Path:
    """Write a corpus of examples, for each split a list of shards, with the tokenizer of the corpus `like`."""
    document = json.loads((like / "manifest.json").read_text())
    shutil.copytree(like / "tokenizer", directory / "tokenizer")
    document["tasks"] = tasks
    for split, shards in splits.items():
        records = []
        (directory / split).mkdir()
        for number, examples in enumerate(shards):
            prefix = directory / split / f"shard-{number:05d}"
            with IndexedWriter(prefix, document["vocab_size"]) as writer:
                for one in examples:
                    record = np.array([(one.task, one.difficulty, one.answer)], EXAMPLE)
                    side = {"mask": np.array(one.mask), "example": record}
                    side |= {"labels": np.array(one.labels)} if labels else {}
                    writer.add_document(np.array(one.tokens), **side)
            counts = {"tokens": writer.tokens, "documents": writer.documents, "text_bytes": 0, "max_id": writer.max_id}
            records.append({"name": prefix.name, **counts, **hash_shard(prefix)})
        totals = {key: sum(record[key] for record in records) for key in ("tokens", "documents", "text_bytes")}
        document["splits"][split] = {**totals, "shards": records}
    (directory / "manifest.json").write_text(json.dumps(document))
    return directory
