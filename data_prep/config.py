"""The schema of a prep run's YAML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_rdt.errors import ConfigError


@dataclass(frozen=True)
class PrepConfig:
    """What to prepare, and how."""

    sources: list[str] = field(default_factory=lambda: ["stdlib"])
    """Where text comes from: files or folders (.txt, .md, .py and so on, .jsonl[.gz|.zst], .parquet), `hf:NAME` or `hf:NAME:CONFIG` for a Hugging Face dataset, `stdlib` for this Python's own library sources."""
    out: str = "data/corpus"
    """Directory to write."""
    extensions: list[str] = field(
        default_factory=lambda: [".txt", ".md", ".rst", ".py", ".c", ".h", ".jsonl", ".parquet"]
    )
    """File endings that are taken, in any case; .gz and .zst may follow. Other than .jsonl and .parquet, a file is one document."""
    text_field: str = "text"
    """Field of a JSONL, Parquet or Hugging Face record that holds the text."""
    hf_split: str = "train"
    """Split of a Hugging Face dataset; it is streamed."""
    max_documents: int = 0
    """Stop after this many documents; 0 takes all."""
    tokenizer: str = ""
    """Existing SentencePiece model or prepared tokenizer folder to use; empty trains one on these documents."""
    tokenizer_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of tokenizer to train; bpe converts to Hugging Face exactly."""
    vocab_size: int = 4096
    """Pieces of the tokenizer to train."""
    special_tokens: list[str] = field(default_factory=lambda: ["<|im_start|>", "<|im_end|>"])
    """Further special tokens of the tokenizer to train, beside <unk>, <s>, </s> and <pad>; no text is ever encoded to them."""
    tokenizer_sample_bytes: int = 10_000_000
    """Bytes of text to train the tokenizer on."""
    valid_fraction: float = 0.02
    """Share of documents that go to the validation split, decided by a hash of each document's content."""
    shard_bytes: int = 268_435_456
    """Largest size of one .bin file, in bytes; a longer document has a file of its own."""
    seed: int = 7
    """Seed of the order of documents."""
    on_bad: Literal["error", "skip", "replace"] = "error"
    """What to do with malformed JSON, a missing text field, invalid UTF-8 or a damaged file: stop; leave it out and count it; or put U+FFFD in the place of invalid UTF-8 and stop at the rest."""
    max_bad: float = 0.001
    """Share of records that may be bad before the job stops all the same; the first 20 never stop it."""
    workers: int = 0
    """Encoding processes; 0 takes one per core. The result does not depend on it."""
    restart: bool = False
    """Replace what an earlier run with other options left in `out`."""


def check_prep(config: PrepConfig) -> None:
    """ConfigError naming the first option that is out of range."""
    smallest = {"vocab_size": 1, "tokenizer_sample_bytes": 1, "shard_bytes": 1, "max_documents": 0, "workers": 0}
    for name, least in smallest.items():
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}, it must be at least {least}. Set --{name}.")
    if not 0 <= config.valid_fraction < 1:
        raise ConfigError(
            f"valid_fraction is {config.valid_fraction}, it must be at least 0 and below 1. Set --valid_fraction."
        )
    if not 0 <= config.max_bad <= 1:
        raise ConfigError(f"max_bad is {config.max_bad}, it must be from 0 to 1. Set --max_bad.")
    if Path(config.out).name in ("", ".."):
        raise ConfigError(f"out is {config.out!r}, it must end with the name of a directory. Set --out.")
    if not config.sources:
        raise ConfigError("sources is empty. Name files, folders, hf:NAME or stdlib in --sources.")
