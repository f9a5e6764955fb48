"""Writing a small corpus of random documents without `rdt prep`."""

import json
import shutil
from pathlib import Path

import numpy as np

from megatron_rdt.data import IndexedWriter, Tokenizer
from megatron_rdt.data.shard_files.block_hashes import hash_shard
from megatron_rdt.data.shard_files.corpus_manifest import FORMAT, MANIFEST, VERSION


def write_random_corpus(
    directory: Path, tokenizer: Path, splits: dict[str, list[int]], masks: bool = False, block_hashes: bool = True
) -> Path:
    """Write a corpus of random documents into `directory`; return `directory`.

    Args:
        directory: directory to create.
        tokenizer: folder of the tokenizer to copy.
        splits: for each split, the number of tokens of each shard.
        masks: write loss masks in which half of the tokens count.
        block_hashes: write the .sum files.
    """
    shutil.copytree(tokenizer, directory / "tokenizer")
    known, draw = Tokenizer(tokenizer), np.random.default_rng(0)
    document: dict = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16",
        "vocab_size": known.vocab_size,
        "bos": known.bos,
        "eos": known.eos,
        "pad": known.pad,
        "tokenizer": {"fingerprint": known.fingerprint},
        "prep": {"append_eos": True},
        "splits": {},
    }
    for split, sizes in {"train": [], "valid": [], **splits}.items():
        (directory / split).mkdir()
        records = []
        for number, size in enumerate(sizes):
            prefix = directory / split / f"shard-{number:05d}"
            with IndexedWriter(prefix, known.vocab_size) as writer:
                while writer.tokens < size:
                    length = min(int(draw.integers(1, 2000)), size - writer.tokens)
                    ids = draw.integers(10, known.vocab_size, length)
                    ids[-1] = known.eos
                    writer.add_document(ids, mask=draw.integers(0, 2, length) if masks else None)
            counts = {"tokens": writer.tokens, "documents": writer.documents, "max_id": writer.max_id}
            records.append({"name": prefix.name, **counts, **hash_shard(prefix)})
            if not block_hashes:
                prefix.with_name(f"{prefix.name}.sum").unlink()
        totals = {key: sum(record[key] for record in records) for key in ("tokens", "documents")}
        document["splits"][split] = {**totals, "shards": records}
    (directory / MANIFEST).write_text(json.dumps(document, indent=1))
    return directory
