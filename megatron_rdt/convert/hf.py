"""Export for transformers: a folder that AutoModelForCausalLM and AutoTokenizer load without this package.

`read_hf` reads such a folder back. Its model code is one file, see `hf_source`.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rdt.checkpoint import (
    EXPORT_WEIGHTS,
    StoredWeights,
    check_weights_fit,
    read_model_weights,
    read_trainer_state,
)
from megatron_rdt.config import ModelConfig, RunConfig, load_saved_config, read_saved_model
from megatron_rdt.convert.hf_source import paste_model_source
from megatron_rdt.convert.hf_tokenizer import HIDDEN_FOLDER, export_tokenizer, read_special_ids
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE as SENTENCEPIECE_FILE
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import write_text
from megatron_rdt.untrusted_files import read_json

MODEL_FILE, CONFIG_FILE, WEIGHTS_FILE = "modeling_rdt.py", "config.json", EXPORT_WEIGHTS
MODEL_TYPE = "megatron_rdt"
AGAIN = "Export the checkpoint again with `rdt convert CHECKPOINT OUT --to hf`."  # the remedy for a bad export
TOKENIZER = "tokenizer_fingerprint"  # in config.json
BEGINS_WITH_BOS = "begins_with_bos"  # in trainer.json
PREFIX = "model."  # the wrapper's name for the model, in front of every weight's


def export_hf(source: Path, out: Path) -> None:
    """Write weights, configs, code, README and tokenizer into `out`; print why, if AutoTokenizer cannot load it."""
    has_bos = read_begins_with_bos(read_trainer_state(source))
    config, weights = load_saved_config(source), read_model_weights(source)
    check_weights_fit(source, config.model, {name: tensor.shape for name, tensor in weights.items()})
    write_export(out, config, weights, source / "tokenizer", has_bos)


def read_begins_with_bos(state: Mapping[str, Any]) -> bool:
    """Return True if documents began with BOS in training, from a checkpoint's trainer.json."""
    data = state.get("data", {})
    # A run records it with its position in the data, an imported model beside that. Checkpoints from before it was
    # recorded say nothing about it; a stream adds no BOS.
    return bool(data.get(BEGINS_WITH_BOS, state.get(BEGINS_WITH_BOS, "stream" not in data)))


def write_export(
    out: Path, config: RunConfig, weights: Mapping[str, torch.Tensor], tokenizer_folder: Path, has_bos: bool
) -> None:
    """Do what `export_hf` does, from its parts.

    Args:
        out: an empty folder.
        config: of the run.
        weights: by name.
        tokenizer_folder: of the checkpoint.
        has_bos: True if documents began with BOS in training; otherwise none is declared, since tools would put it first.
    """
    save_file({PREFIX + k: v.contiguous() for k, v in weights.items()}, out / WEIGHTS_FILE, {"format": "pt"})
    write_text(out / MODEL_FILE, paste_model_source())
    shutil.copymode(out / MODEL_FILE, out / WEIGHTS_FILE)  # safetensors makes it readable for the owner alone
    loops = round(config.depth.mean)
    tokenizer = Tokenizer(tokenizer_folder)
    specials = read_special_ids(tokenizer) | ({} if has_bos else {"bos_token_id": None})
    settings = {
        "architectures": ["RdtForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "modeling_rdt.RdtConfig",
            "AutoModel": "modeling_rdt.RdtModel",
            "AutoModelForCausalLM": "modeling_rdt.RdtForCausalLM",
        },
        "max_position_embeddings": config.train.sequence_length,
        "loops": loops,
        "dtype": "float32",
        **specials,
        "tie_word_embeddings": config.model.tie_embeddings,
        "model": dataclasses.asdict(config.model),
        TOKENIZER: tokenizer.fingerprint,
    }
    write_text(out / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
    write_text(out / "generation_config.json", json.dumps(specials, indent=1) + "\n")
    if left_out := export_tokenizer(tokenizer_folder, out, config.train.sequence_length, has_bos):
        print(
            f"the tokenizer is left out, AutoTokenizer will not load this folder: {left_out}. "
            f"Use {HIDDEN_FOLDER}/{SENTENCEPIECE_FILE} in it with sentencepiece; its README.md shows how."
        )
    write_text(out / "README.md", _format_model_card(config.run.name, loops, left_out))


def is_hf_export(folder: Path) -> bool:
    """Return True if `folder` has the config and the weights of an export."""
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


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
    try:
        file = safe_open(folder / WEIGHTS_FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged ({error}). {AGAIN}") from None
    keys = {key.removeprefix(PREFIX): key for key in file.keys()}  # noqa: SIM118  (not iterable itself)

    def read(name: str) -> torch.Tensor:
        # A copy, since tensors in the file are not aligned like PyTorch's own, and products of them differ in the last digit.
        return file.get_tensor(keys[name]).to(torch.float32, copy=True)

    shapes = {name: torch.Size(file.get_slice(key).get_shape()) for name, key in keys.items()}
    return config, StoredWeights(shapes, read)


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse an export whose tokenizer is not the one that its model was trained with, with a CheckpointError."""
    wanted = read_json(folder / CONFIG_FILE).get(TOKENIZER)
    if wanted is not None and tokenizer.fingerprint != wanted:
        raise CheckpointError(f"the tokenizer in {folder} is not the one that the model was trained with. {AGAIN}")


def _format_model_card(name: str, loops: int, left_out: str) -> str:
    """Return the README of an export.

    Args:
        name: of the run.
        loops: default number of iterations.
        left_out: why there is no tokenizer for transformers; empty if there is one.
    """
    head = f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A recurrent-depth transformer: its core runs `loops` times, chosen at every call (default here {loops}).
"""
    if not left_out:
        return f"""{head}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, loops=8)[0]))
```
"""
    return f"""{head}
**There is no tokenizer for transformers here**, and AutoTokenizer does not load this folder: {left_out}.
The tokenizer is the SentencePiece model `{HIDDEN_FOLDER}/{SENTENCEPIECE_FILE}`.
Do not let transformers convert it: the ids may differ.

```python
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = SentencePieceProcessor(model_file=f"{{PATH}}/{HIDDEN_FOLDER}/{SENTENCEPIECE_FILE}")
inputs = torch.tensor([tokenizer.encode("def ")])
print(tokenizer.decode(model.generate(inputs, max_new_tokens=50, loops=8)[0].tolist()))
```
"""
