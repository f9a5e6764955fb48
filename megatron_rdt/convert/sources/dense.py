"""Dense models (Llama, SmolLM, Mistral, Qwen 2 and 3, OLMo 2) cut into prelude, core and coda.

The first layers become the prelude, the last the coda, and those just before the coda the core; layers in between are
dropped if the three numbers do not add up to all. The injection is diagonal with decay and input gain 1/2 in every
channel, and the initial state is the encoded input e, so

    x = h / 2 + e / 2,   h_0 = e

With T = 1 the core's input is e itself: the looped model computes what the dense one (without the dropped layers) does,
to the last bit of e, since halves add up exactly. With more loops the core sees e and half of what its layers have added.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources.decay import DECAY_PARAMETERS
from megatron_rdt.convert.sources.llama_layers import make_layer_rules, read_layer_config
from megatron_rdt.convert.sources.rules import Rule, Rules, copy_rules, read_count

IGNORED = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|lm_head\.weight"
PRE = {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
POST = {"attention_outer_norm": "post_attention_layernorm", "feedforward_outer_norm": "post_feedforward_layernorm"}
# By model_type: the name for people, and the options of `model` by which its layers differ from Llama's.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {"qk_bias": True, "value_bias": True}),
    "qwen3": ("Qwen3", {"qk_norm": "learned"}),
    "olmo2": ("OLMo 2", {"qk_norm": "joint", "norm_placement": "post"}),
}
# Parameters of a zoh `DiagonalDecay` whose decay and input factor are exactly 1/2 in float32: found by a search through
# neighbouring numbers, since the rounding of exp and log decides.
HALVES = {"rate": 7.62939453125e-05, "step": 0.16520118713378906, "gain": 1.0001758337020874}
Cut = tuple[int, int, int]


def recognizes(settings: Mapping[str, Any]) -> bool:
    """Return True for the config.json of one of the models that can be cut."""
    return settings.get("model_type") in KINDS


def count_layers(settings: Mapping[str, Any]) -> int:
    """Return the number of layers of the dense model."""
    return read_count(settings, "num_hidden_layers")


def read_model_config(settings: Mapping[str, Any], cut: Cut) -> ModelConfig:
    """Return the config of the looped model; ValueError for a part that has no equal here."""
    kind, options = KINDS[settings["model_type"]]
    prelude, core, coda = cut
    return ModelConfig(
        **read_layer_config(settings, kind),
        **options,
        prelude_layers=prelude,
        core_layers=core,
        coda_layers=coda,
        encoded_norm=False,
        injection="diagonal",
        state_init="encoded",
    )


def read_depth() -> dict[str, Any]:
    """Return the options of `depth` for continued pretraining: the mean of T grows over a quarter of 5000 steps."""
    return {
        **{"scheme": "lognormal_poisson", "mean": 4, "max": 16, "per": "micro_batch"},
        **{"curriculum": "one_minus_sqrt", "curriculum_steps": 1250},
    }


def list_kept_layers(cut: Cut, layers: int) -> list[int]:
    """Return the numbers of the dense model's layers that are used, in order; ValueError if it has too few.

    Args:
        cut: layers of prelude, core and coda.
        layers: of the dense model.
    """
    prelude, core, coda = cut
    if min(cut) < 0 or core < 1 or sum(cut) > layers:
        raise ValueError(
            f"--cut {','.join(map(str, cut))} does not fit a model of {layers} layers: give the layers of prelude, core "
            f"(at least 1) and coda, together at most {layers}"
        )
    return [*range(prelude), *range(layers - coda - core, layers)]


def make_rules(config: ModelConfig, layers: int) -> Rules:
    """Return the rule of every weight.

    Args:
        config: of the looped model.
        layers: of the dense model.
    """
    cut = config.prelude_layers, config.core_layers, config.coda_layers
    names = [f"{part}.{i}" for part, count in zip(("prelude", "core.layers", "coda"), cut) for i in range(count)]
    rules = copy_rules({"embedding": "embed_tokens", "final_norm": "norm"}, theirs="model.")
    norms = POST if config.norm_placement == "post" else PRE
    for name, index in zip(names, list_kept_layers(cut, layers), strict=True):
        extra = {"biased": config.value_bias, "qk_norms": config.qk_norm in ("learned", "joint")}
        rules |= make_layer_rules(name, f"model.layers.{index}", norms, **extra)
    for name in DECAY_PARAMETERS:
        half = Rule((), partial(make_half, config.dim, name), "decay and gain 1/2")
        rules[f"core.injection.diagonal.{name}"] = half
    if not config.tie_embeddings:
        rules["head.weight"] = Rule(("lm_head.weight",))
    return rules


def find_dropped_weights(config: ModelConfig, layers: int) -> str:
    """Return the pattern of weights that are not used: `IGNORED`, and all of the dropped layers."""
    cut = config.prelude_layers, config.core_layers, config.coda_layers
    dropped = sorted(set(range(layers)) - set(list_kept_layers(cut, layers)))
    return IGNORED + (rf"|model\.layers\.({'|'.join(map(str, dropped))})\..*" if dropped else "")


def make_half(dim: int, name: str) -> Tensor:
    """Return the parameter `name` of a zoh `DiagonalDecay`, (dim,), with decay and input factor 1/2."""
    return torch.full((dim,), HALVES[name])
