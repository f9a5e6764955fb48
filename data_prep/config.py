"""The options of `rdt prep`, as its YAML file and its flags name them, and the checks of their values."""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.cleaning import check_cleaning
from megatron_rdt.data.hugging_face import PREFIX
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import PathText

TEXT_MARK = "=text"  # `.json=text` in `extensions`: each such file is one plain text document
STDLIB = "stdlib"  # the source that stands for the modules of this Python's standard library
SMALLEST_FILE_BYTES = 100  # of a part of the input, and of a shard
SMALLEST_SAMPLE_BYTES = 10_000
MOST_WORKERS = 1024
FIXED_PIECES = 262  # of a trained tokenizer: 256 bytes, 4 control pieces, line break, tab
MOST_IDS = 2**31 - 1  # ids are int32


@dataclass(frozen=True)
class PrepConfig:
    """Options of `rdt prep`: the text to prepare, and how."""

    sources: list[PathText] = field(default_factory=lambda: ["stdlib"])
    """Sources of text: files or folders (.txt, .md, .py and so on, .jsonl[.gz|.zst], .parquet), `hf:NAME` or `hf:NAME:CONFIG` for a Hugging Face dataset, `stdlib` for the sources of this Python's standard library."""
    valid_sources: list[PathText] = field(default_factory=list)
    """Further sources, whose documents all go to the validation split; `valid_fraction` is then ignored."""
    out: PathText = "data/corpus"
    """Directory of the corpus to write."""
    extensions: list[str] = field(
        default_factory=lambda: [".txt", ".md", ".rst", ".py", ".c", ".h", ".jsonl", ".parquet"]
    )
    """File endings to read, in upper or lower case; .gz and .zst may follow. A file other than .jsonl, .json, .ndjson and .parquet is one document; .json=text makes one of each .json too."""
    text_field: str = "text"
    """Field of a JSONL, Parquet or Hugging Face record that holds the text."""
    prompt_field: str = ""
    """Field of a record that holds a prompt: text that precedes the text and does not count for the loss. A record without the field has no prompt."""
    task_field: str = ""
    """Field of a record that names the task of an example, as `rdt prep tasks` writes them; needs `difficulty_field`. A record is then BOS, prompt, text and EOS, taken as it is: no cleaning, no removal of duplicates, and EOS does not count for the loss."""
    difficulty_field: str = ""
    """Field of a record that holds the difficulty of an example, a whole number."""
    label_field: str = ""
    """Field of a record that holds the answer at every position of the prompt, separated by spaces, `_` where there is none. A record with labels is BOS, prompt and EOS, so that the answers are targets and never input; its text is the last of them."""
    hf_split: str = "train"
    """Split of a Hugging Face dataset to stream."""
    max_documents: int = 0
    """Take only this many documents: the first ones in the order of the input that are not empty; 0 takes all."""
    normalize: Literal["none", "NFC", "NFKC", "NFD", "NFKD"] = "none"
    """Unicode normalisation of every text."""
    min_chars: int = 0
    """Drop documents with fewer characters."""
    max_chars: int = 0
    """Drop documents with more characters; 0 is no limit."""
    max_repeated_lines: float = 1.0
    """Drop documents with a larger share of characters in lines that occurred before in the same document."""
    max_repeated_ngrams: float = 1.0
    """Drop documents with a larger share of characters covered by their most frequent word n-gram (Gopher, arXiv:2112.11446)."""
    filters: list[str] = field(default_factory=list)
    """Custom filters: module:function, or the name of an entry point; function(text) -> bool, True keeps the document."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """Duplicates to remove: none, documents of equal content, or also those that share most of their word 5-grams (MinHash)."""
    near_threshold: float = 0.8
    """Jaccard similarity from which documents count as near-duplicates."""
    tokenizer: PathText = ""
    """Existing tokenizer to use: a SentencePiece model, a folder with a Hugging Face tokenizer.json, or the tokenizer of a prepared corpus; empty trains one on these documents."""
    tokenizer_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of tokenizer to train; both can be exported exactly for transformers."""
    vocab_size: int = 4096
    """Number of pieces of the tokenizer to train."""
    special_tokens: list[str] = field(default_factory=lambda: ["<|im_start|>", "<|im_end|>"])
    """Special tokens of the tokenizer to train, in addition to <unk>, <s>, </s> and <pad>; no text is ever encoded to them."""
    tokenizer_sample_bytes: int = 10_000_000
    """Bytes of text to train the tokenizer on; at least 10,000."""
    valid_fraction: float = 0.02
    """Share of documents in the validation split, decided by a hash of each document's content."""
    shard_bytes: int = 268_435_456
    """Largest size of one .bin file, in bytes, at least 100; a longer document gets a file to itself."""
    part_bytes: int = 0
    """Bytes of input per part, the unit of work that workers and machines share, at least 100; 0 chooses 1 to 64 MB."""
    seed: int = 7
    """Seed of the order of documents within a shard, and of the sample that the tokenizer is trained on."""
    on_bad: Literal["error", "skip", "replace"] = "error"
    """Policy for malformed JSON, a missing text field, invalid UTF-8 or a damaged file: stop; skip and count it; or replace invalid UTF-8 with U+FFFD and stop at anything else."""
    max_bad: float = 0.001
    """Share of bad records, or of bytes in files that cannot be read to their end, above which the job stops even with `on_bad: skip`; up to 20 records never stop it."""
    workers: int = 0
    """Worker processes; 0 takes one per core, or does small work without any; 1 starts none. The result does not depend on it."""
    scheduler: PathText = ""
    """Address of a running Dask scheduler (tcp://host:8786), or the file that `dask scheduler --scheduler-file` writes: its workers, on any number of machines, do the work. The result does not depend on them."""
    dashboard: int = 0
    """Port of 127.0.0.1 on which Dask shows what the workers of this machine do; 0 shows nothing. Needs bokeh."""
    restart: bool = False
    """Replace a corpus in `out`, or an unfinished prep of it, that was made with other options."""


def _check_sizes(config: PrepConfig) -> None:
    """Raise ConfigError naming the first size or number that is out of range."""
    # Smaller parts and shards cost more than they hold: each is a file with a record, written to the disk at once.
    ranges = {
        "part_bytes": (SMALLEST_FILE_BYTES, None),
        "shard_bytes": (SMALLEST_FILE_BYTES, None),
        "tokenizer_sample_bytes": (SMALLEST_SAMPLE_BYTES, None),
        "max_documents": (0, None),
        "workers": (0, MOST_WORKERS),
        "dashboard": (0, 65535),
        # A tokenizer that is trained has a piece for every byte and special token.
        "vocab_size": (1 if config.tokenizer else FIXED_PIECES + len(config.special_tokens), MOST_IDS),
    }
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if name == "part_bytes" and value == 0:
            continue
        if value < least or (most is not None and value > most):
            limits = f"at least {least:,}" if most is None else f"from {least:,} to {most:,}"
            automatic = ", or 0 to choose it from the input" if name == "part_bytes" else ""
            unit = " bytes" if name.endswith("_bytes") else ""
            raise ConfigError(f"{name} is {value}{unit}, it must be {limits}{automatic}. Set --{name}.")


def _check_sources(config: PrepConfig) -> None:
    """Raise ConfigError if a source is named twice, or if validation sources contain one of the others."""
    named: dict[str, tuple[str, str]] = {}
    for option in ("sources", "valid_sources"):
        for source in getattr(config, option):
            location = _identify_source(source)
            first, where = named.setdefault(location, (source, ""))
            same = source if first == source else f"{first}, the same as {source},"
            if where == option:
                raise ConfigError(f"{same} is given twice in {option}. Give it once in --{option}.")
            if where:
                raise ConfigError(f"{same} is in sources and in valid_sources. Keep it in one of them.")
            named[location] = (source, option)
    # Validation sources within one of the others are no fault: what is in both is validation only.
    for source in config.sources:
        for valid in config.valid_sources:
            location, folder = _resolve_source(source), _resolve_source(valid)
            if os.path.isabs(location) and Path(location).is_relative_to(folder):
                raise ConfigError(
                    f"{source} in sources is below {valid} in valid_sources: nothing of it would be left to train on. Keep it "
                    "in one of them."
                )


def _resolve_source(source: str) -> str:
    """Return the real path of a source, without `hf:`; a source that is no existing path is returned unchanged."""
    path = source.removeprefix(PREFIX)
    return os.path.realpath(path) if source != STDLIB and os.path.exists(path) else source


def _identify_source(source: str) -> str:
    """Return the same text for two sources that are one file or folder, hard links included."""
    location = _resolve_source(source)
    status = os.stat(location) if os.path.isfile(location) else None
    # As in `identify_file`: the number of a file tells something only where it has several names.
    return f"{status.st_dev}:{status.st_ino}" if status and status.st_nlink > 1 else location


def check_prep(config: PrepConfig) -> None:
    """Raise ConfigError for the first option that is out of range or contradicts another; no file is opened."""
    _check_sizes(config)
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
    for name in ("sources", "valid_sources"):
        if not all(getattr(config, name)):
            raise ConfigError(
                f"{name} has an empty entry, which would be the working directory. Remove it from --{name}."
            )
    _check_sources(config)
    if config.prompt_field and config.prompt_field == config.text_field:
        raise ConfigError(f"prompt_field and text_field are both {config.text_field!r}. Name two fields.")
    _check_example_fields(config)
    _check_extensions(config)
    _check_workers(config)
    check_cleaning(config)


def _check_example_fields(config: PrepConfig) -> None:
    """Raise ConfigError if fields of examples are missing or repeated, or if an option would change or drop examples."""
    if not (config.task_field or config.difficulty_field or config.label_field):
        return
    for name in ("prompt_field", "task_field", "difficulty_field"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty, examples need it. Set --{name}, or omit the fields of examples.")
    fields = [config.text_field, config.prompt_field, config.task_field, config.difficulty_field, config.label_field]
    repeated = [name for name in fields if name and fields.count(name) > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]!r} is named as two fields of a record. Name different ones.")
    if streamed := [source for source in (*config.sources, *config.valid_sources) if source.startswith(PREFIX)]:
        raise ConfigError(f"{streamed[0]} has no examples of tasks: they are read from files. Omit --task_field.")
    # Small difficulties have few different problems, which training sees again and again.
    unchanged = {"dedup": "none", "normalize": "none", "min_chars": 0, "max_chars": 0, "filters": []}
    unchanged |= {"max_repeated_lines": 1.0, "max_repeated_ngrams": 1.0}
    for name, value in unchanged.items():
        if getattr(config, name) != value:
            shown = value if value != [] else "[]"
            raise ConfigError(
                f"{name} is {getattr(config, name)}, which would drop or change examples of tasks. Set --{name} {shown}."
            )


def _check_extensions(config: PrepConfig) -> None:
    """Raise ConfigError naming the first extension that is empty or has another mark than `=text`."""
    for extension in config.extensions:
        ending, equals, mark = extension.partition("=")
        if not ending or (equals and f"={mark}" != TEXT_MARK):
            raise ConfigError(
                f"extension {extension!r} is not an ending such as .txt, or .json{TEXT_MARK} for plain text. Set --extensions."
            )


def _check_workers(config: PrepConfig) -> None:
    """Raise ConfigError if options about workers contradict each other, or if the dashboard cannot be shown."""
    if config.scheduler and (config.workers or config.dashboard):
        name = "workers" if config.workers else "dashboard"
        raise ConfigError(
            f"{name} is {getattr(config, name)}, but the workers are those of --scheduler {config.scheduler}. Omit --{name}."
        )
    if config.dashboard and importlib.util.find_spec("bokeh") is None:
        raise ConfigError("dashboard is set, but the package bokeh is not installed. Install it, or omit --dashboard.")
