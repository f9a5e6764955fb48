"""State dicts of other recurrent-depth models (OpenMythos, Parcae, Huginn) converted to state dicts of this one.

Each function takes a state dict and the config that describes the same network (configs/models has those of the
published sizes), and returns a state dict for `RecurrentDepthTransformer(config).load_state_dict`. Every weight of the
source is used; a missing or a superfluous one is an error. docs/parity.md says which logits agree, and how closely.
"""

import math
import re
from collections.abc import Mapping

import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.diagonal import RATE_BOUNDS, STEP_BOUNDS
from megatron_rdt.model.iteration_signals import FEATURES, loop_features

Weights = dict[str, torch.Tensor]
# Range of |a| dt in `DiagonalDecay`, and with it of the decay exp(-|a| dt).
PRODUCT_BOUNDS = (RATE_BOUNDS[0] * STEP_BOUNDS[0], RATE_BOUNDS[1] * STEP_BOUNDS[1])
# Parcae's feed-forward computes relu(x)^2 / 2.
PARCAE_RELU2_SCALE = 0.5


class Source:
    """A state dict whose entries are taken one by one, so that unused ones can be reported.

    Args:
        state: weights by name.
        ignored: regular expression of names without learned content: tables of rotary positions, tied copies.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], ignored: str) -> None:
        self._left = {name: value for name, value in state.items() if not re.fullmatch(ignored, name)}

    def take(self, name: str) -> torch.Tensor:
        """Remove and return the weight `name`; ValueError if it is not there."""
        if name not in self._left:
            raise ValueError(f"the weights have no {name}; the config describes another network")
        return self._left.pop(name)

    def copy(self, names: Mapping[str, str], ours: str = "", theirs: str = "") -> Weights:
        """Take each `theirs`OLD.weight and return it as `ours`NEW.weight, for names given as new -> old."""
        return {f"{ours}{new}.weight": self.take(f"{theirs}{old}.weight") for new, old in names.items()}

    def check_all_used(self) -> None:
        """Raise ValueError if a weight was not taken."""
        if self._left:
            few = ", ".join(sorted(self._left)[:3])
            raise ValueError(f"{len(self._left)} weights do not exist in the config's network: {few} ...")


def solve_decay_parameters(product: torch.Tensor, input_gain: torch.Tensor, prefix: str) -> Weights:
    """Return the parameters of a zoh `DiagonalDecay` with decay exp(-product) and input factor `input_gain`.

    Args:
        product: |a| dt per channel, (dim,).
        input_gain: (dim,).
        prefix: name of the module in the new state dict.

    Raises:
        ValueError: a product lies outside `PRODUCT_BOUNDS`, since the source's decay is too close to 1 or to 0.
    """
    low, high = PRODUCT_BOUNDS
    wide = product.double()
    outside = int(((wide <= low) | (wide >= high)).sum())
    if outside:
        raise ValueError(
            f"{outside} of {wide.numel()} channels decay by up to {float(torch.exp(-wide.min())):.6g} per iteration; "
            f"here the decay lies between exp(-{high:g}) and exp(-{low:g}) = {math.exp(-low):.4g}"
        )
    # Only the product |a| dt is given. Rate and step are put at the same fraction of their logarithmic ranges; their
    # product is then at that fraction of its own range, PRODUCT_BOUNDS.
    signed = 2 * (wide / low).log() / math.log(high / low) - 1  # the fraction, scaled to (-1, 1)
    raw = signed / (1 - signed.abs())  # inverse of the softsign by which `DiagonalDecay` maps a parameter to (-1, 1)
    fraction = 0.5 + 0.5 * signed
    rate = RATE_BOUNDS[0] * (RATE_BOUNDS[1] / RATE_BOUNDS[0]) ** fraction
    # A zero-order hold multiplies the input by gain * (1 - exp(-|a| dt)) / |a|.
    gain = input_gain.double() * rate / -torch.expm1(-wide)
    values = {"rate": raw, "step": raw, "gain": gain}
    return {f"{prefix}.{name}": value.to(product.dtype) for name, value in values.items()}


def fit_scale_weights(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit (weights, bias) of a `LoraSignal` so that its scale in iteration t is row t of `table`, (iterations, rank).

    `LoraSignal` computes the scale from features of t instead of looking it up. The fit is exact for up to FEATURES / 2
    iterations; of all exact solutions it is the one of least norm, which defines the scale beyond the table.
    """
    if len(table) > FEATURES // 2:
        raise ValueError(f"the table has {len(table)} iterations, a function of t here can fit {FEATURES // 2} of them")
    wide, features = table.double(), loop_features(torch.arange(len(table))).squeeze(1).double()
    bias = wide.mean(0)
    weights = torch.linalg.lstsq(features, wide - bias, driver="gelsd").solution
    return weights.T.contiguous().to(table.dtype), bias.to(table.dtype)


def from_open_mythos(state: Mapping[str, torch.Tensor], config: ModelConfig) -> Weights:
    """Convert a state dict of `OpenMythos` (open-mythos 0.5.0); config as in configs/models/openmythos_1b.yaml.

    `attention` is gqa or mla. With `halting: none` the halting unit is ignored.
    """
    _require_zoh(config)
    halting = "" if config.halting == "act" else r"|recurrent\.act\..*"
    source = Source(state, rf"freqs_cis(_mla)?|head\.weight{halting}")
    weights = source.copy({
        "embedding": "embed",
        "final_norm": "norm",
        "core.injection.norm": "recurrent.norm",
        "core.signals.lora.down": "recurrent.lora.down",
    })  # fmt: skip
    outer = [f"prelude.{i}" for i in range(config.prelude_layers)] + [f"coda.{i}" for i in range(config.coda_layers)]
    for layer in outer:  # called the same there
        weights |= _convert_mythos_layer(source, layer, layer, config)
        parts = {part: part for part in ("gate", "up", "down")}
        weights |= source.copy(parts, f"{layer}.feedforward.", f"{layer}.ffn.")
    weights |= _convert_mythos_layer(source, "core.layers.0", "recurrent.block", config)
    weights |= _convert_mythos_experts(source, "core.layers.0.feedforward", "recurrent.block.ffn", config)
    product = torch.exp(source.take("recurrent.injection.log_A") + source.take("recurrent.injection.log_dt"))
    weights |= solve_decay_parameters(product, source.take("recurrent.injection.B"), "core.injection.diagonal")
    weights["core.signals.sinusoidal.size"] = torch.ones(config.dim // 8, dtype=product.dtype)
    weights["core.signals.lora.up"] = source.take("recurrent.lora.B").T.contiguous()
    scale, bias = fit_scale_weights(source.take("recurrent.lora.scale.weight"))
    weights |= {"core.signals.lora.weights": scale, "core.signals.lora.bias": bias}
    if config.halting == "act":
        weights["core.halting.weight"] = source.take("recurrent.act.halt.weight").squeeze(0)
        weights["core.halting.bias"] = source.take("recurrent.act.halt.bias")
    source.check_all_used()
    return weights


def _convert_mythos_layer(source: Source, ours: str, theirs: str, config: ModelConfig) -> Weights:
    """Take norms and attention of the layer `theirs`; return them under the name `ours`."""
    weights = source.copy({"attention_norm": "attn_norm", "feedforward_norm": "ffn_norm"}, f"{ours}.", f"{theirs}.")
    names = {"query": "wq", "key": "wk", "value": "wv"}
    if config.attention == "mla":
        names = {"query_down": "q_down", "query_norm": "q_norm"}
        names |= {"latent_down": "kv_down", "latent_norm": "kv_norm", "latent_up": "kv_up"}
    weights |= source.copy({"output": "wo", **names}, f"{ours}.attention.", f"{theirs}.attn.")
    if config.attention == "mla":  # per head, channels without rotary position, then those with it
        parts = [source.take(f"{theirs}.attn.q_up_{part}.weight") for part in ("nope", "rope")]
        heads = [part.unflatten(0, (config.heads, -1)) for part in parts]
        weights[f"{ours}.attention.query_up.weight"] = torch.cat(heads, dim=1).flatten(0, 1)
    return weights


def _convert_mythos_experts(source: Source, ours: str, theirs: str, config: ModelConfig) -> Weights:
    """Convert the router, the routed experts (stacked per matrix) and the shared ones (concatenated to one)."""
    weights = {f"{ours}.router": source.take(f"{theirs}.router.weight")}
    weights[f"{ours}.selection_bias"] = source.take(f"{theirs}.router_bias")
    for part in ("gate", "up", "down"):
        routed = [source.take(f"{theirs}.routed_experts.{i}.{part}.weight") for i in range(config.experts)]
        weights[f"{ours}.{part}"] = torch.stack(routed)
        if config.shared_experts:
            shared = [source.take(f"{theirs}.shared_experts.{i}.{part}.weight") for i in range(config.shared_experts)]
            weights[f"{ours}.shared.{part}.weight"] = torch.cat(shared, dim=1 if part == "down" else 0)
    return weights


def from_parcae(state: Mapping[str, torch.Tensor], config: ModelConfig) -> Weights:
    """Convert a state dict of `Parcae` with diagonal injection; config as in configs/models/parcae_140m.yaml."""
    _require_zoh(config)
    source = Source(state, r"freqs_cis|lm_head\.weight")
    names = {"embedding": "wte", "final_norm": "ln_f", "core.encoded_norm": "ln_prelude", "core.output_matrix": "C"}
    weights = source.copy(names, theirs="transformer.")
    names = {"attention_norm": "norm_1", "feedforward_norm": "norm_2", "feedforward.up": "mlp.fc"}
    names |= {"attention.query": "attn.c_q", "attention.key": "attn.c_k", "attention.value": "attn.c_v"}
    names |= {"attention.output": "attn.c_proj"}
    layers = _raven_layer_names(config)
    for index, (ours, theirs) in enumerate(layers):
        weights |= source.copy(names, f"{ours}.", f"{theirs}.")
        weights[f"{ours}.feedforward.down.weight"] = PARCAE_RELU2_SCALE * source.take(f"{theirs}.mlp.proj.weight")
        if index % 2 == (len(layers) - 1) % 2:
            weights[f"{ours}.attention.token_values.weight"] = source.take(f"value_embeds.{index}.weight")
            weights[f"{ours}.attention.token_values.gate.weight"] = source.take(f"{theirs}.attn.ve_gate.weight")
    step = torch.nn.functional.softplus(source.take("transformer.adapter.dt_bias"))
    product = step * torch.exp(source.take("transformer.adapter.A_log"))
    weights |= solve_decay_parameters(product, step, "core.injection.diagonal")
    weights["core.input_matrix.weight"] = source.take("transformer.adapter.B")
    source.check_all_used()
    return weights


def from_huginn(state: Mapping[str, torch.Tensor], config: ModelConfig) -> Weights:
    """Convert a state dict of `RavenForCausalLM` (Huginn); config as in configs/models/huginn_3_5b.yaml."""
    source = Source(state, r"freqs_cis|lm_head\.weight")
    names = {"embedding": "wte", "core.injection": "adapter", "final_norm": "ln_f"}
    weights = source.copy(names, theirs="transformer.")
    names = {"attention_norm": "norm_1", "attention_outer_norm": "norm_2"}
    names |= {"feedforward_norm": "norm_3", "feedforward_outer_norm": "norm_4"}
    names |= {"attention.output": "attn.proj", "feedforward.down": "mlp.proj"}
    width = config.kv_heads * config.head_dim
    for ours, theirs in _raven_layer_names(config):
        weights |= source.copy(names, f"{ours}.", f"{theirs}.")
        qkv = source.take(f"{theirs}.attn.Wqkv.weight").split([config.dim, width, width])
        biases = source.take(f"{theirs}.attn.qk_bias").flatten(1)
        gate_and_up = source.take(f"{theirs}.mlp.fc.weight").chunk(2)
        weights |= {f"{ours}.attention.{name}.weight": part for name, part in zip(("query", "key", "value"), qkv)}
        weights |= {f"{ours}.attention.{name}_bias": part for name, part in zip(("query", "key"), biases)}
        weights |= {f"{ours}.feedforward.{name}.weight": part for name, part in zip(("gate", "up"), gate_and_up)}
    source.check_all_used()
    return weights


def _raven_layer_names(config: ModelConfig) -> list[tuple[str, str]]:
    """Return (our name, Huginn's name) of every layer, in order; Parcae kept Huginn's names."""
    groups = (
        ("prelude", "prelude", config.prelude_layers),
        ("core.layers", "core_block", config.core_layers),
        ("coda", "coda", config.coda_layers),
    )
    return [(f"{ours}.{i}", f"transformer.{theirs}.{i}") for ours, theirs, count in groups for i in range(count)]


def _require_zoh(config: ModelConfig) -> None:
    """Raise ValueError unless the config discretizes by zero-order hold."""
    if config.discretization != "zoh":
        raise ValueError("the source decays by exp(-|a| dt); set model.discretization to zoh")
