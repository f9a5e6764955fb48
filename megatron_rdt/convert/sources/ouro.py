"""Ouro (arXiv:2510.25741): every layer is looped, the input is the initial state, and a norm ends each iteration."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources.llama_layers import make_layer_rules, read_layer_config
from megatron_rdt.convert.sources.rules import Rule, Rules, copy_rules, read_count

NAME, IGNORED = "Ouro", r"model\.rotary_emb\.inv_freq|lm_head\.weight"
NORMS = {
    **{"attention_norm": "input_layernorm", "attention_outer_norm": "input_layernorm_2"},
    **{"feedforward_norm": "post_attention_layernorm", "feedforward_outer_norm": "post_attention_layernorm_2"},
}


def recognizes(settings: Mapping[str, Any]) -> bool:
    """Return True for the config.json of an Ouro."""
    return settings.get("model_type") == "ouro"


def read_model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the same network; ValueError for a variant that has no equal here."""
    return ModelConfig(
        **read_layer_config(settings, NAME),
        prelude_layers=0,
        core_layers=read_count(settings, "num_hidden_layers"),
        coda_layers=0,
        norm_placement="peri",
        core_norm="iteration",
        final_norm=False,
        encoded_norm=False,
        injection="none",
        state_init="encoded",
        halting="gate",
    )


def read_depth(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `depth` with which such a model is trained."""
    loops = read_count(settings, "total_ut_steps")
    return {"scheme": "fixed", "mean": loops, "max": loops}


def make_rules(config: ModelConfig) -> Rules:
    """Return the rule of every weight."""
    rules = copy_rules({"embedding": "embed_tokens", "core.iteration_norm": "norm"}, theirs="model.")
    for index in range(config.core_layers):
        names = f"core.layers.{index}", f"model.layers.{index}"
        rules |= make_layer_rules(*names, NORMS, biased=False, qk_norms=False)
    gate = "model.early_exit_gate"
    rules["core.halting.weight"] = Rule((f"{gate}.weight",), torch.flatten, "flattened")
    rules["core.halting.bias"] = Rule((f"{gate}.bias",))
    if not config.tie_embeddings:
        rules["head.weight"] = Rule(("lm_head.weight",))
    return rules
