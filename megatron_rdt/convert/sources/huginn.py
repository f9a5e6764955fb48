"""Huginn (arXiv:2502.05171): `RavenForCausalLM` of seal-rg/recurrent-pretraining, as a folder for transformers."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources.rules import (
    Rule,
    Rules,
    copy_rules,
    read_count,
    read_setting,
    require_settings,
    row_rules,
)

NAME, IGNORED = "Huginn", r"freqs_cis|lm_head\.weight"
LAYER_NAMES = {
    **{"attention_norm": "norm_1", "attention_outer_norm": "norm_2"},
    **{"feedforward_norm": "norm_3", "feedforward_outer_norm": "norm_4"},
    **{"attention.output": "attn.proj", "feedforward.down": "mlp.proj"},
}


def recognizes(settings: Mapping[str, Any]) -> bool:
    """Return True for the config.json of Huginn."""
    return settings.get("model_type") == "huginn_raven"


def read_model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the same network; ValueError for a variant that has no equal here."""
    only = {"block_class_name": "SandwichBlock", "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "bias": False}
    only |= {"injection_type": "linear", "state_init": "like-init", "norm_class_name": "RMSNorm_llama"}
    require_settings(settings, NAME, only)
    heads = read_count(settings, "num_attention_heads", "n_heads")
    return ModelConfig(
        vocab_size=read_setting(settings, int, "padded_vocab_size", "vocab_size"),
        dim=read_setting(settings, int, "n_embd", "hidden_size"),
        prelude_layers=read_setting(settings, int, "n_layers_in_prelude"),
        core_layers=read_setting(settings, int, "n_layers_in_recurrent_block"),
        coda_layers=read_setting(settings, int, "n_layers_in_coda"),
        heads=heads,
        kv_heads=settings.get("num_key_value_heads", heads),
        qk_bias=settings.get("qk_bias", True),
        rope_base=read_setting({"rope_base": 50000.0, **settings}, float, "rope_base"),
        rope_pairing="adjacent",
        ffn_dim=read_setting(settings, int, "intermediate_size"),
        norm_placement="sandwich",
        norm_eps=read_setting(settings, float, "norm_eps"),
        core_norm="last_shared",
        encoded_norm=False,
        injection="linear",
        state_init="normal",
        state_std=math.sqrt(2 / 5),
        scale_embedding=True,
        tie_embeddings=settings.get("tie_embeddings", settings.get("tie_word_embeddings", True)),
    )


def read_depth(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `depth` with which such a model is trained."""
    mean, kept = read_loop_counts(settings, 32, 8)
    return {"scheme": "lognormal_poisson", "mean": mean, "max": 8 * mean, "backprop": kept, "per": "micro_batch"}


def read_loop_counts(settings: Mapping[str, Any], mean: int, kept: int) -> tuple[int, int]:
    """Return the mean of T and the iterations with gradients, or these defaults; Parcae kept Huginn's names."""
    given = {"mean_recurrence": mean, "mean_backprop_depth": kept, **settings}
    return read_count(given, "mean_recurrence"), read_count(given, "mean_backprop_depth")


def make_rules(config: ModelConfig) -> Rules:
    """Return the rule of every weight."""
    rules = copy_rules({"embedding": "wte", "core.injection": "adapter", "final_norm": "ln_f"}, theirs="transformer.")
    if not config.tie_embeddings:
        rules["head.weight"] = Rule(("lm_head.weight",))
    width = config.kv_heads * config.head_dim
    for ours, theirs in list_layer_names(config):
        rules |= copy_rules(LAYER_NAMES, f"{ours}.", f"{theirs}.")
        names = [f"{ours}.attention.{name}.weight" for name in ("query", "key", "value")]
        rules |= row_rules(names, (config.dim, width, width), f"{theirs}.attn.Wqkv.weight")
        if config.qk_bias:
            for index, name in enumerate(("query", "key")):
                take = partial(_take_entry, index=index, heads=config.heads)
                bias = Rule((f"{theirs}.attn.qk_bias",), take, f"entry {index}, flattened")
                rules[f"{ours}.attention.{name}_bias"] = bias
        names = [f"{ours}.feedforward.{name}.weight" for name in ("gate", "up")]
        rules |= row_rules(names, (config.ffn_width,) * 2, f"{theirs}.mlp.fc.weight")
    return rules


def _take_entry(bias: Tensor, index: int, heads: int) -> Tensor:
    """Return the bias of queries (0) or keys (1), (heads * channels,), of both (2, 1, heads, channels)."""
    if bias.shape[-2] != heads:  # no other weight of such a layer shows it
        raise ValueError(f"it is of {bias.shape[-2]} heads, the config of {heads}")
    return bias[index].flatten().clone()


def list_layer_names(config: ModelConfig) -> list[tuple[str, str]]:
    """Return (our name, Huginn's name) of every layer, in order; Parcae kept Huginn's names."""
    groups = (
        ("prelude", "prelude", config.prelude_layers),
        ("core.layers", "core_block", config.core_layers),
        ("coda", "coda", config.coda_layers),
    )
    return [(f"{ours}.{i}", f"transformer.{theirs}.{i}") for ours, theirs, count in groups for i in range(count)]
