"""Export for transformers: a folder that AutoModelForCausalLM and AutoTokenizer load without this package.

Its model code is one file, see `hf_source`; for its weights see `hf_weights`, for the page about it `hf_card`, for the logits
by which it can be checked `hf_parity`.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from megatron_rdt.checkpoint import (
    check_weights_fit,
    open_weights,
    read_begins_with_bos,
    read_manifest,
    read_trainer_state,
)
from megatron_rdt.config import load_saved_config
from megatron_rdt.convert.hf import CONFIG_FILE, MODEL_FILE, MODEL_TYPE, TOKENIZER, ExportOptions, ExportSource
from megatron_rdt.convert.hf_card import format_model_card
from megatron_rdt.convert.hf_parity import write_parity
from megatron_rdt.convert.hf_source import paste_model_source
from megatron_rdt.convert.hf_tokenizer import HIDDEN_FOLDER, export_tokenizer, open_exported_tokenizer, read_special_ids
from megatron_rdt.convert.hf_weights import write_weights
from megatron_rdt.convert.sources.files import list_weight_files
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE as SENTENCEPIECE_FILE
from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.files import write_text


def export_hf(source: Path, out: Path, options: ExportOptions | None = None) -> None:
    """Write an export of the verified checkpoint `source` into the empty folder `out`, see `write_export`."""
    options = options or ExportOptions()
    state, config = read_trainer_state(source), load_saved_config(source)
    weights = open_weights(source, options.weights)
    check_weights_fit(source, config.model, weights.shapes)
    has_bos = read_begins_with_bos(state)
    if has_bos is None:  # a checkpoint from before it was recorded; a stream added no BOS then
        has_bos = "stream" not in state.get("data", {})
    manifest = read_manifest(source)
    found = ExportSource(
        source,
        config,
        weights,
        source / "tokenizer",
        has_bos,
        step=state["step"],
        tokens=state.get("tokens", 0),
        origin=manifest.get("converted_from"),
        began_from=Path(str((manifest.get("origin") or {}).get("checkpoint", ""))).name,
        is_average=options.weights == "ema",
    )
    write_export(out, found, options)


def write_export(out: Path, source: ExportSource, options: ExportOptions) -> None:
    """Write weights, configs, code, tokenizer, logits to check and README into the empty folder `out`.

    One file of weights, or one layer, is in memory at a time. It prints why, if AutoTokenizer cannot load the tokenizer,
    and how near the logits are to the checkpoint's.

    Raises:
        CheckpointError: a weight or a logit is not finite, or `out` does not hold what was written.
    """
    config, tokenizer = source.config, Tokenizer(source.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(
            f"{source.path}: its tokenizer has {tokenizer.vocab_size} ids, the embedding {config.model.vocab_size} rows. "
            f"{USE_ANOTHER}"
        )
    write_text(out / MODEL_FILE, paste_model_source())
    write_weights(out, source.path, source.weights, options.dtype, options.shard_size)
    for file in list_weight_files(out):
        shutil.copymode(out / MODEL_FILE, file)  # safetensors makes it readable for the owner alone
    left_out = export_tokenizer(source.tokenizer, out, config.train.sequence_length, source.has_bos)
    specials = read_special_ids(tokenizer) | ({} if source.has_bos else {"bos_token_id": None})
    settings = {
        "architectures": ["RdtForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "modeling_rdt.RdtConfig",
            "AutoModel": "modeling_rdt.RdtModel",
            "AutoModelForCausalLM": "modeling_rdt.RdtForCausalLM",
        },
        "max_position_embeddings": config.train.sequence_length,
        "loops": round(config.depth.mean),
        "dtype": options.dtype,
        **specials,
        "tie_word_embeddings": config.model.tie_embeddings,
        "model": dataclasses.asdict(config.model),
        TOKENIZER: open_exported_tokenizer(out).fingerprint,
    }
    write_text(out / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
    write_text(out / "generation_config.json", json.dumps(specials, indent=1) + "\n")
    if left_out:
        print(
            f"the tokenizer is left out, AutoTokenizer will not load this folder: {left_out}. "
            f"Use {HIDDEN_FOLDER}/{SENTENCEPIECE_FILE} in it with sentencepiece; its README.md shows how."
        )
    sentence = write_parity(out, source, options.dtype, tokenizer)
    print(sentence)
    results = [] if options.describe is None else options.describe(source.path, out)
    size = sum(file.stat().st_size for file in list_weight_files(out))
    write_text(out / "README.md", format_model_card(source, options.dtype, size, sentence, left_out, results))
