"""An export for transformers: names in its folder, what one is made of, and how it is read back. `hf_export` writes it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint import (
    StoredWeights,
    has_export_weights,
)
from megatron_rdt.config import ModelConfig, RunConfig, read_saved_model
from megatron_rdt.convert.sources.files import open_source_weights
from megatron_rdt.convert.sources.rules import read_count
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError
from megatron_rdt.run_directory import WeightKind
from megatron_rdt.untrusted_files import read_json

MODEL_FILE, CONFIG_FILE = "modeling_rdt.py", "config.json"
MODEL_TYPE = "megatron_rdt"
AGAIN = "Export the checkpoint again with `rdt convert CHECKPOINT OUT --to hf`."  # the remedy for a bad export
TOKENIZER = "tokenizer_fingerprint"  # in config.json
PREFIX = "model."  # the wrapper's name for the model, in front of every weight's


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        dtype: of the weights in the files, "float32" or "bfloat16".
        shard_size: the largest size of a file of weights, in transformers' words.
        describe: called with the checkpoint and the export's folder, into which it may write pictures; returns sections
            of Markdown about what the model scored. None adds none.
        weights: "ema" for the average of the weights.
    """

    dtype: str = "float32"
    shard_size: str = "5GB"
    describe: Callable[[Path, Path], list[str]] | None = None
    weights: WeightKind = "model"


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A checkpoint, as far as an export needs it.

    Attributes:
        path: of the checkpoint.
        config: of its run.
        weights: every parameter and persistent buffer.
        tokenizer: its folder.
        has_bos: True if documents began with BOS in training; otherwise none is declared, since tools would put it first.
        step, tokens: how far it was trained.
        origin: entry `converted_from` of its manifest; None for a checkpoint that a run wrote.
        began_from: name of the checkpoint or export from whose weights its run began; "" for random ones.
        is_average: the weights are the average of the run's weights.
    """

    path: Path
    config: RunConfig
    weights: StoredWeights
    tokenizer: Path
    has_bos: bool
    step: int = 0
    tokens: int = 0
    origin: Any = None
    began_from: str = ""
    is_average: bool = False


def is_hf_export(folder: Path) -> bool:
    """Return True if `folder` has the config and the weights of an export."""
    return (folder / CONFIG_FILE).is_file() and has_export_weights(folder)


def read_hf(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Read the model's config and its weights by name, float32, from a folder that `export_hf` wrote; see `open_hf`."""
    config, weights = open_hf(folder)
    return config, {name: weights.read(name) for name in weights.shapes}


def open_hf(folder: Path) -> tuple[ModelConfig, StoredWeights]:
    """Read the model's config from a folder that `export_hf` wrote, and open its weights.

    Raises:
        CheckpointError: the folder is damaged, or holds another kind of model.
    """
    try:
        settings: Any = read_json(folder / CONFIG_FILE)
        if settings["model_type"] != MODEL_TYPE:
            raise CheckpointError(
                f"{folder} holds a model of type {settings['model_type']}, not one that `rdt convert --to hf` wrote. "
                "Name an export, a run or a checkpoint."
            )
        config = read_saved_model(settings["model"], folder / CONFIG_FILE)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not the config of an export ({error}). {AGAIN}") from None
    weights = open_source_weights(folder)
    names = {name.removeprefix(PREFIX): name for name in weights.shapes}

    def read(name: str) -> torch.Tensor:
        # A copy, since tensors in the file are not aligned like PyTorch's own, and products of them differ in the last digit.
        return weights.read(names[name]).to(torch.float32, copy=True)

    return config, StoredWeights({name: weights.shapes[full] for name, full in names.items()}, read)


def read_declared_length(folder: Path) -> int:
    """Return the tokens of a sequence in the training of an export; CheckpointError if its config does not say."""
    try:
        return read_count(read_json(folder / CONFIG_FILE), "max_position_embeddings")
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}. {AGAIN}") from None


def describe_call_settings(settings: Mapping[str, Any]) -> str:
    """Return the exit rule and the cache budget that the config of an export sets for calls; "" if it sets none."""
    found = [
        f"{name} {settings[name]!r}"
        for name, default in (("exit", "fixed"), ("cache_budget", 0))
        if settings.get(name) not in (None, default)
    ]
    return " and ".join(found)


def has_declared_bos(folder: Path) -> bool:
    """Return True if an export names BOS, as it does where documents began with it in training."""
    return read_json(folder / CONFIG_FILE).get("bos_token_id") is not None


def check_tokenizer(folder: Path, tokenizer: Tokenizer, remedy: str = AGAIN) -> None:
    """Refuse an export whose tokenizer is not the one that its model was trained with, with a CheckpointError."""
    wanted = read_json(folder / CONFIG_FILE).get(TOKENIZER)
    if wanted is not None and tokenizer.fingerprint != wanted:
        raise CheckpointError(f"the tokenizer in {folder} is not the one that the model was trained with. {remedy}")
