"""The files beside examples that are written as symbols: their tokenizer, and the options of `rdt prep` for them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.reasoning.instances import Task, mark_answer
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE, SETTINGS_FILE
from megatron_rdt.files import fsync_directory, write_text

TOKENIZER, PREP_OPTIONS = "tokenizer", "prep.yaml"
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


def list_vocabulary(tasks: Sequence[Task]) -> list[str]:
    """Return all symbols of tasks, the special ones first; an id is an index. ConfigError if a task has too many."""
    found = [BOS, EOS, UNKNOWN]
    for task in tasks:
        inputs, answers = task.vocabulary()
        found += [task.symbol, *inputs, *mark_answer(answers)]
    return list(dict.fromkeys(found))


def write_symbol_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    """Write a tokenizer whose tokens are the words of a text that spaces separate, as transformers reads it."""
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([BOS, EOS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    work = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_text(work / JSON_FILE, tokenizer.to_str())
    write_text(work / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
    fsync_directory(work)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def write_prep_options(out: Path, shown: str, has_test: bool, has_labels: bool) -> None:
    """Write the options with which `rdt prep` makes a corpus of the examples in a folder.

    Args:
        out: the folder.
        shown: its path, as it is to be written into the file.
        has_test: True if there is a test.jsonl, for the validation split.
        has_labels: True if the examples have labels.
    """
    options: dict[str, object] = {"out": f"{shown}_tokens", "sources": [f"{shown}/train.jsonl"]}
    if has_test:
        options["valid_sources"] = [f"{shown}/test.jsonl"]
    options |= {"prompt_field": "prompt", "task_field": "task", "difficulty_field": "difficulty"}
    if has_labels:
        options["label_field"] = "labels"
    options |= {"dedup": "none", "tokenizer": f"{shown}/{TOKENIZER}"}
    write_text(out / PREP_OPTIONS, yaml.safe_dump(options, sort_keys=False))
