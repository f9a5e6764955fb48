"""Parcae (arXiv:2604.12946): `Parcae` of SandyResearch/parcae, a folder with config.json and a PyTorch state dict."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources.decay import DECAY_PARAMETERS, solve_decay_parameters
from megatron_rdt.convert.sources.huginn import list_layer_names, read_loop_counts
from megatron_rdt.convert.sources.rules import Rule, Rules, copy_rules, read_setting, require_settings

NAME, IGNORED = "Parcae", r"freqs_cis|lm_head\.weight"
# Its feed-forward computes relu(x)^2 / 2.
RELU2_SCALE = 0.5
LAYER_NAMES = {
    **{"attention_norm": "norm_1", "feedforward_norm": "norm_2", "feedforward.up": "mlp.fc"},
    **{"attention.query": "attn.c_q", "attention.key": "attn.c_k", "attention.value": "attn.c_v"},
    **{"attention.output": "attn.c_proj"},
}


def recognizes(settings: Mapping[str, Any]) -> bool:
    """Return True for the config.json of a Parcae."""
    return "n_layers_in_recurrent_block" in settings and settings.get("model_class_name") == "Parcae"


def read_model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the same network; ValueError for a variant that has no equal here."""
    only: dict[str, Any] = {
        "block_class_name": "TransformerPreNormBlock",
        "mlp_class_name": "BaseMLP",
        "nonlin_name": "ReLU2",
    }
    only |= {"injection_type": "diagonal", "state_init": "like-init", "norm_class_name": "RMSNorm", "bias": False}
    only |= {"init_strategy": "scaled-zero", "tie_embeddings": True, "qk_bias": False, "clip_qkv": None}
    require_settings(settings, NAME, only)
    dim, heads = read_setting(settings, int, "n_embd"), read_setting(settings, int, "num_attention_heads")
    inner = read_setting(settings, int, "intermediate_size")
    same = {"recurrent_embedding_dimension": dim, "recurrent_intermediation_embedding_dimension": inner}
    require_settings(settings, NAME, same)
    if settings.get("recurrent_num_attention_heads") not in (None, heads):
        raise ValueError(
            "recurrent_num_attention_heads differs from num_attention_heads; here all layers have one width"
        )
    rope = dict(settings.get("rope_settings") or {})
    return ModelConfig(
        vocab_size=read_setting(settings, int, "padded_vocab_size", "vocab_size"),
        dim=dim,
        prelude_layers=read_setting(settings, int, "n_layers_in_prelude"),
        core_layers=read_setting(settings, int, "n_layers_in_recurrent_block"),
        coda_layers=read_setting(settings, int, "n_layers_in_coda"),
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        qk_norm="plain" if read_setting({"qk_norm": False, **settings}, bool, "qk_norm") else "none",
        rope_base=read_setting({"rope_base": 50000.0, **rope}, float, "rope_base"),
        rope_pairing="adjacent",
        value_embeddings="gated",
        ffn="relu2",
        ffn_dim=inner,
        norm_eps=read_setting(settings, float, "norm_eps"),
        encoded_norm=settings.get("prelude_norm", False),
        input_matrix=True,
        output_matrix=True,
        state_init="normal",
        state_std=math.sqrt(2 / (5 * dim)),
        logit_softcap=settings.get("logit_softcap") or 0.0,
    )


def read_depth(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `depth` with which such a model is trained."""
    mean, kept = read_loop_counts(settings, 8, 4)
    per = "sequence" if settings.get("recurrent_iteration_method") == "per-sequence" else "micro_batch"
    return {"scheme": "poisson", "mean": mean, "max": 4 * mean, "backprop": kept, "per": per}


def make_rules(config: ModelConfig) -> Rules:
    """Return the rule of every weight; ValueError unless the config discretizes by zero-order hold."""
    require_zoh(config)
    names = {"embedding": "wte", "final_norm": "ln_f", "core.output_matrix": "C"}
    names |= {"core.encoded_norm": "ln_prelude"} if config.encoded_norm else {}
    rules = copy_rules(names, theirs="transformer.")
    layers = list_layer_names(config)
    for index, (ours, theirs) in enumerate(layers):
        rules |= copy_rules(LAYER_NAMES, f"{ours}.", f"{theirs}.")
        down = Rule((f"{theirs}.mlp.proj.weight",), _scale_output, "halved, since relu(x)^2 is halved there")
        rules[f"{ours}.feedforward.down.weight"] = down
        if index % 2 == (len(layers) - 1) % 2:
            rules[f"{ours}.attention.token_values.weight"] = Rule((f"value_embeds.{index}.weight",))
            rules[f"{ours}.attention.token_values.gate.weight"] = Rule((f"{theirs}.attn.ve_gate.weight",))
    adapter = "transformer.adapter"
    for name in DECAY_PARAMETERS:
        made = Rule((f"{adapter}.A_log", f"{adapter}.dt_bias"), partial(_make_decay, name=name), "solved for")
        rules[f"core.injection.diagonal.{name}"] = made
    rules["core.input_matrix.weight"] = Rule((f"{adapter}.B",))
    return rules


def _scale_output(weight: Tensor) -> Tensor:
    """Return the weight times `RELU2_SCALE`."""
    return RELU2_SCALE * weight


def _make_decay(log_rate: Tensor, step_bias: Tensor, name: str) -> Tensor:
    """Return the parameter `name` of a decay exp(-dt A) with input factor dt."""
    step = torch.nn.functional.softplus(step_bias)
    return solve_decay_parameters(step * torch.exp(log_rate), step)[name]


def require_zoh(config: ModelConfig) -> None:
    """Raise ValueError unless the config discretizes by zero-order hold."""
    if config.discretization != "zoh":
        raise ValueError("the source decays by exp(-|a| dt); set model.discretization to zoh")
