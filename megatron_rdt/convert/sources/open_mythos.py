"""OpenMythos (open-mythos 0.5.0): a state dict of `OpenMythos`, alone or in the checkpoint of its training script."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources.decay import DECAY_PARAMETERS, fit_rules, solve_decay_parameters
from megatron_rdt.convert.sources.parcae import require_zoh
from megatron_rdt.convert.sources.rules import (
    Rule,
    Rules,
    copy_rules,
    join_weights,
    read_count,
    read_setting,
    stack_weights,
)

NAME = "OpenMythos"
# Fields of `MythosConfig`, by the name that they have here.
FIELDS = {
    **{"vocab_size": "vocab_size", "dim": "dim", "heads": "n_heads", "kv_heads": "n_kv_heads"},
    **{"prelude_layers": "prelude_layers", "coda_layers": "coda_layers", "experts": "n_experts"},
    **{"kv_rank": "kv_lora_rank", "query_rank": "q_lora_rank", "rope_dim": "qk_rope_head_dim"},
    **{"nope_dim": "qk_nope_head_dim", "value_dim": "v_head_dim", "shared_experts": "n_shared_experts"},
    **{"experts_per_token": "n_experts_per_tok", "expert_dim": "expert_dim", "signal_rank": "lora_rank"},
}
LOOP_INDEX_SHARE = 8  # the loop index is added to one channel in eight


def recognizes(settings: Mapping[str, Any]) -> bool:
    """Return True for the fields of a `MythosConfig`."""
    return {"attn_type", "max_loop_iters", "n_experts"} <= set(settings)


def list_ignored(config: ModelConfig) -> str:
    """Return the pattern of weights that are left out: rotary tables, the tied head, and the unused halting unit."""
    halting = "" if config.halting == "act" else r"|recurrent\.act\..*"
    return rf"freqs_cis(_mla)?|head\.weight{halting}"


def read_model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the same network."""
    sizes: dict[str, Any] = {ours: read_setting(settings, int, theirs) for ours, theirs in FIELDS.items()}
    chosen, expert = sizes["experts_per_token"], sizes["expert_dim"]
    return ModelConfig(
        **sizes,
        core_layers=1,
        attention=read_setting(settings, str, "attn_type"),  # type: ignore[arg-type]
        rope_base=read_setting(settings, float, "rope_theta"),
        rope_pairing="adjacent",
        ffn_dim=sizes["dim"] * 4 // 3,
        core_ffn="moe",
        shared_expert_dim=expert * chosen,
        encoded_norm=False,
        injection="residual",
        state_init="encoded",
        signals=["sinusoidal", "lora"],
        halting="act",
        halting_threshold=read_setting(settings, float, "act_threshold"),
    )


def read_depth(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `depth` with which such a model is trained."""
    loops = read_count(settings, "max_loop_iters")
    return {"scheme": "fixed", "mean": loops, "max": loops}


def make_rules(config: ModelConfig) -> Rules:
    """Return the rule of every weight; `attention` is gqa or mla, `halting` act or none."""
    require_zoh(config)
    rules = copy_rules({
        "embedding": "embed",
        "final_norm": "norm",
        "core.injection.norm": "recurrent.norm",
        "core.signals.lora.down": "recurrent.lora.down",
    })  # fmt: skip
    outer = [f"prelude.{i}" for i in range(config.prelude_layers)] + [f"coda.{i}" for i in range(config.coda_layers)]
    for layer in outer:  # called the same there
        rules |= _make_layer_rules(layer, layer, config)
        rules |= copy_rules({part: part for part in ("gate", "up", "down")}, f"{layer}.feedforward.", f"{layer}.ffn.")
    rules |= _make_layer_rules("core.layers.0", "recurrent.block", config)
    rules |= _make_expert_rules("core.layers.0.feedforward", "recurrent.block.ffn", config)
    injection = tuple(f"recurrent.injection.{name}" for name in ("log_A", "log_dt", "B"))
    for name in DECAY_PARAMETERS:
        rules[f"core.injection.diagonal.{name}"] = Rule(injection, partial(_make_decay, name=name), "solved for")
    size = partial(torch.ones, config.dim // LOOP_INDEX_SHARE)
    rules["core.signals.sinusoidal.size"] = Rule((), size, "1, since it is fixed there")
    rules["core.signals.lora.up"] = Rule(("recurrent.lora.B",), transpose_weight, "transposed")
    rules |= fit_rules("core.signals.lora", "recurrent.lora.scale.weight")
    if config.halting == "act":
        rules["core.halting.weight"] = Rule(("recurrent.act.halt.weight",), torch.flatten, "flattened")
        rules["core.halting.bias"] = Rule(("recurrent.act.halt.bias",))
    return rules


def transpose_weight(weight: Tensor) -> Tensor:
    """Return the transposed matrix, contiguous."""
    return weight.T.contiguous()


def _make_decay(log_rate: Tensor, log_step: Tensor, gain: Tensor, name: str) -> Tensor:
    """Return the parameter `name` of a decay exp(-exp(log_A + log_dt)) with input factor B."""
    return solve_decay_parameters(torch.exp(log_rate + log_step), gain)[name]


def _make_layer_rules(ours: str, theirs: str, config: ModelConfig) -> Rules:
    """Return the rules of norms and attention of the layer `theirs`, called `ours` here."""
    rules = copy_rules({"attention_norm": "attn_norm", "feedforward_norm": "ffn_norm"}, f"{ours}.", f"{theirs}.")
    names = {"query": "wq", "key": "wk", "value": "wv"}
    if config.attention == "mla":
        names = {"query_down": "q_down", "query_norm": "q_norm"}
        names |= {"latent_down": "kv_down", "latent_norm": "kv_norm", "latent_up": "kv_up"}
    rules |= copy_rules({"output": "wo", **names}, f"{ours}.attention.", f"{theirs}.attn.")
    if config.attention == "mla":
        parts = tuple(f"{theirs}.attn.q_up_{part}.weight" for part in ("nope", "rope"))
        interleave = partial(_interleave_heads, heads=config.heads)
        rules[f"{ours}.attention.query_up.weight"] = Rule(parts, interleave, "both parts of each head joined")
    return rules


def _interleave_heads(*parts: Tensor, heads: int) -> Tensor:
    """Join parts head by head: channels without rotary position, then those with it."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def _make_expert_rules(ours: str, theirs: str, config: ModelConfig) -> Rules:
    """Return the rules of the router, the routed experts (stacked per matrix) and the shared ones (joined to one)."""
    rules = {f"{ours}.router": Rule((f"{theirs}.router.weight",))}
    rules[f"{ours}.selection_bias"] = Rule((f"{theirs}.router_bias",))
    for part in ("gate", "up", "down"):
        routed = tuple(f"{theirs}.routed_experts.{i}.{part}.weight" for i in range(config.experts))
        rules[f"{ours}.{part}"] = Rule(routed, stack_weights, "stacked")
        if config.shared_experts:
            shared = tuple(f"{theirs}.shared_experts.{i}.{part}.weight" for i in range(config.shared_experts))
            joined = Rule(shared, partial(join_weights, dim=1 if part == "down" else 0), "joined")
            rules[f"{ours}.shared.{part}.weight"] = joined
    return rules
