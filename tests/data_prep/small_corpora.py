"""Sources of sixty short documents, options that prepare them quickly, and the content of what was prepared."""

import dataclasses
import json
from pathlib import Path

from data_prep.config import PrepConfig
from megatron_rdt.data import IndexedDataset, Tokenizer, load_manifest

RECORDS = [json.dumps({"text": f"document {i} says " + "word " * (i % 7) + str(i * i)}) for i in range(60)]
"""Sixty lines of JSON."""


def make_config(source: Path, out: Path, **changes: object) -> PrepConfig:
    """Options for a small corpus, with one worker."""
    base = PrepConfig(sources=[str(source)], out=str(out), vocab_size=320, valid_fraction=0.2, workers=1)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def write_lines(path: Path, content: list[str | bytes]) -> Path:
    """Write lines to a file; return its path."""
    path.write_bytes(b"\n".join(c if isinstance(c, bytes) else c.encode() for c in content) + b"\n")
    return path


def read_files(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory, by relative path."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def read_split_texts(corpus: Path, split: str) -> list[str]:
    """Decode the documents of a split, in their order."""
    tokenizer = Tokenizer(corpus / "tokenizer")
    shards = [IndexedDataset(prefix) for prefix in load_manifest(corpus).shard_prefixes(split)]
    return [tokenizer.decode(shard[i][:-1].tolist()) for shard in shards for i in range(len(shard))]


def read_texts(corpus: Path) -> set[str]:
    """Decode the documents of both splits."""
    return {text for split in ("train", "valid") for text in read_split_texts(corpus, split)}
