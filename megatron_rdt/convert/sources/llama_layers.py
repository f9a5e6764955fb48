"""Names of Llama's layers (Llama, Mistral, Qwen, OLMo 2, and Ouro, which kept them), and the config of such a layer."""

from collections.abc import Mapping
from typing import Any

from megatron_rdt.convert.sources.rules import Rule, Rules, copy_rules, read_count, read_setting, require_settings

PROJECTIONS = {
    **{"attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj"},
    **{"attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj"},
    **{"feedforward.gate": "mlp.gate_proj", "feedforward.up": "mlp.up_proj", "feedforward.down": "mlp.down_proj"},
}
BIASES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
MISTRAL_WINDOW = 4096  # where the config names none
QK_NORMS = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}


def read_layer_config(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the options of `model` that the config.json of such a model sets, without the numbers of layers.

    Raises:
        ValueError: the model has a part that this project's does not have.
    """
    require_settings(settings, kind, {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False})
    dim, heads = read_setting(settings, int, "hidden_size"), read_count(settings, "num_attention_heads")
    width = heads * (read_count(settings, "head_dim") if settings.get("head_dim") else dim // heads)
    return {
        "vocab_size": read_setting(settings, int, "vocab_size"),
        "dim": dim,
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads") or heads,
        "attention_dim": 0 if width == dim else width,
        "window": _read_window(settings, kind),
        "ffn_dim": read_setting(settings, int, "intermediate_size"),
        "norm_eps": read_setting(settings, float, "rms_norm_eps"),
        "tie_embeddings": settings.get("tie_word_embeddings") or False,
        **_read_rope(settings, kind),
    }


def _read_window(settings: Mapping[str, Any], kind: str) -> int:
    """Return the sliding window of all layers, 0 for none; ValueError if only some layers have one."""
    kinds = set(settings.get("layer_types") or [])
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types has {', '.join(sorted(kinds))}; here all layers of a model have the same attention"
        )
    # transformers leaves settings that have their default out of some files; those of a window differ.
    window = settings.get("sliding_window", MISTRAL_WINDOW if kind == "Mistral" else 0) or 0
    if kinds:
        return window if kinds == {"sliding_attention"} else 0
    if not settings.get("use_sliding_window", kind == "Mistral") or not window:
        return 0
    if settings.get("max_window_layers", 0):
        raise ValueError("only the layers from max_window_layers on have a sliding window; here all or none have it")
    return window


def _read_rope(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the options of rotary positions, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    name = rope.get("rope_type", rope.get("type", "default"))
    base = read_setting({"rope_theta": 10000.0, **settings, **rope}, float, "rope_theta")
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("only a part of each head's channels is rotated (partial_rotary_factor); here all are")
    options: dict[str, Any] = {"rope_base": base}
    if name == "llama3":
        options["rope_scaling"] = "llama3"
        options["rope_factor"] = read_setting(rope, float, "factor")
        options["rope_slow_turns"] = read_setting(rope, float, "low_freq_factor")
        options["rope_fast_turns"] = read_setting(rope, float, "high_freq_factor")
        options["rope_original_length"] = read_setting(rope, int, "original_max_position_embeddings")
    elif name != "default":
        raise ValueError(
            f"its rotary positions are scaled by {name!r}; of {kind} only the types default and llama3 exist here"
        )
    return options


def make_layer_rules(ours: str, theirs: str, norms: Mapping[str, str], *, biased: bool, qk_norms: bool) -> Rules:
    """Return the rules of one layer.

    Args:
        ours, theirs: its name here and there, such as "prelude.0" and "model.layers.0".
        norms: names of its norms, ours -> theirs.
        biased: queries, keys and values have biases.
        qk_norms: queries and keys are normalised with learned gains.
    """
    names = {**PROJECTIONS, **norms, **(QK_NORMS if qk_norms else {})}
    rules = copy_rules(names, f"{ours}.", f"{theirs}.")
    for name, old in BIASES.items() if biased else ():
        rules[f"{ours}.attention.{name}_bias"] = Rule((f"{theirs}.self_attn.{old}.bias",))
    return rules
