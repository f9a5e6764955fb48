"""The schema of a prep run's YAML."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.cleaning import check_cleaning
from megatron_rdt.errors import ConfigError


@dataclass(frozen=True)
class PrepConfig:
    """What to prepare, and how."""

    sources: list[str] = field(default_factory=lambda: ["stdlib"])
    """Where text comes from: files or folders (.txt, .md, .py and so on, .jsonl[.gz|.zst], .parquet), `hf:NAME` or `hf:NAME:CONFIG` for a Hugging Face dataset, `stdlib` for this Python's own library sources."""
    valid_sources: list[str] = field(default_factory=list)
    """More sources, whose documents all go to the validation split; `valid_fraction` then takes none of the others."""
    out: str = "data/corpus"
    """Directory to write."""
    extensions: list[str] = field(
        default_factory=lambda: [".txt", ".md", ".rst", ".py", ".c", ".h", ".jsonl", ".parquet"]
    )
    """File endings that are taken, in any case; .gz and .zst may follow. Other than .jsonl and .parquet, a file is one document."""
    text_field: str = "text"
    """Field of a JSONL, Parquet or Hugging Face record that holds the text."""
    prompt_field: str = ""
    """Field of a record that holds text before the text which does not count for the loss; a record without it has no prompt."""
    hf_split: str = "train"
    """Split of a Hugging Face dataset; it is streamed."""
    max_documents: int = 0
    """Take only the first documents that are not empty, this many, in the order of the input; 0 takes all."""
    normalize: Literal["none", "NFC", "NFKC", "NFD", "NFKD"] = "none"
    """Unicode normalisation of every text."""
    min_chars: int = 0
    """Drop documents with fewer characters."""
    max_chars: int = 0
    """Drop documents with more characters; 0 is no limit."""
    max_repeated_lines: float = 1.0
    """Drop documents with a larger share of characters in lines that occurred before in the document."""
    max_repeated_ngrams: float = 1.0
    """Drop documents with a larger share of characters covered by their most frequent word n-gram (Gopher, arXiv:2112.11446)."""
    filters: list[str] = field(default_factory=list)
    """Filters of your own: module:function, or the name of an entry point; function(text) -> bool, True keeps."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """Remove no duplicates, those of equal content, or those that share most of their word 5-grams too (MinHash)."""
    near_threshold: float = 0.8
    """Jaccard similarity from which on documents are near-duplicates."""
    tokenizer: str = ""
    """Existing tokenizer to use: a SentencePiece model, a folder with a Hugging Face tokenizer.json, or one that was prepared; empty trains one on these documents."""
    tokenizer_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of tokenizer to train; both have an exact form for transformers."""
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
    part_bytes: int = 0
    """Bytes of input per unit of work, of which workers and machines take one after another; 0 chooses 1 to 64 MB."""
    seed: int = 7
    """Seed of the order of documents."""
    on_bad: Literal["error", "skip", "replace"] = "error"
    """What to do with malformed JSON, a missing text field, invalid UTF-8 or a damaged file: stop; leave it out and count it; or put U+FFFD in the place of invalid UTF-8 and stop at the rest."""
    max_bad: float = 0.001
    """Share of records that may be bad before the job stops all the same; the first 20 never stop it."""
    workers: int = 0
    """Processes; 0 takes one per core. The result does not depend on it."""
    shard: str = ""
    """i/N: this is task i of N (0 <= i < N) that share the work and the file system; `rdt prep merge` then finishes. The result does not depend on it."""
    restart: bool = False
    """Replace what an earlier run with other options left in `out`, or unfinished beside it."""


def check_prep(config: PrepConfig) -> None:
    """ConfigError naming the first option that is out of range."""
    smallest = {"vocab_size": 1, "tokenizer_sample_bytes": 1, "shard_bytes": 1, "part_bytes": 0}
    for name, least in (smallest | {"max_documents": 0, "workers": 0}).items():
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}, it must be at least {least}. Set --{name}.")
    if not 0 <= config.valid_fraction < 1:
        raise ConfigError(
            f"valid_fraction is {config.valid_fraction}, it must be at least 0 and below 1. Set --valid_fraction."
        )
    if not 0 <= config.max_bad <= 1:
        raise ConfigError(f"max_bad is {config.max_bad}, it must be from 0 to 1. Set --max_bad.")
    if config.dedup == "near" and not 0 < config.near_threshold < 1:
        raise ConfigError(
            f"near_threshold is {config.near_threshold}, it must be above 0 and below 1. Set --near_threshold."
        )
    if Path(config.out).name in ("", ".."):
        raise ConfigError(f"out is {config.out!r}, it must end with the name of a directory. Set --out.")
    if not config.sources:
        raise ConfigError("sources is empty. Name files, folders, hf:NAME or stdlib in --sources.")
    for source in config.valid_sources:
        if source in config.sources:
            raise ConfigError(f"{source} is in sources and in valid_sources. Leave it in one of them.")
    if config.prompt_field and config.prompt_field == config.text_field:
        raise ConfigError(f"prompt_field and text_field are both {config.text_field!r}. Name two fields.")
    task_of(config)
    check_cleaning(config)


def task_of(config: PrepConfig) -> tuple[int, int] | None:
    """(i, N) of the option `shard`, None without it; ConfigError where it is not i/N with 0 <= i < N."""
    if not config.shard:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", config.shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"shard is {config.shard!r}, it must be i/N with 0 <= i < N, such as 0/4. Set --shard.")
    return int(match[1]), int(match[2])
