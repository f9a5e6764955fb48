"""Decays and tables over iterations of other projects, expressed by the parameters of this one's modules."""

import math
from functools import partial

import torch
from torch import Tensor

from megatron_rdt.convert.sources.rules import Rule, Rules
from megatron_rdt.model.injection.diagonal import RATE_BOUNDS, STEP_BOUNDS
from megatron_rdt.model.iteration_signals import FEATURES, loop_features

# Range of |a| dt in `DiagonalDecay`, and with it of the decay exp(-|a| dt).
PRODUCT_BOUNDS = (RATE_BOUNDS[0] * STEP_BOUNDS[0], RATE_BOUNDS[1] * STEP_BOUNDS[1])
DECAY_PARAMETERS = ("rate", "step", "gain")


def solve_decay_parameters(product: Tensor, input_gain: Tensor) -> dict[str, Tensor]:
    """Return the parameters of a zoh `DiagonalDecay` with decay exp(-product) and input factor `input_gain`.

    Args:
        product: |a| dt per channel, (dim,).
        input_gain: (dim,).

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
    return {name: value.to(product.dtype) for name, value in zip(DECAY_PARAMETERS, (raw, raw, gain))}


def fit_scale_weights(table: Tensor) -> tuple[Tensor, Tensor]:
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


def fit_rules(ours: str, table: str) -> Rules:
    """Return the rules of a `LoraSignal`'s weights and bias, called `ours`, fitted to the weight `table`."""
    return {
        f"{ours}.{name}": Rule((table,), partial(_fit_part, index=index), "fitted to the table over iterations")
        for index, name in enumerate(("weights", "bias"))
    }


def _fit_part(table: Tensor, index: int) -> Tensor:
    """Return part `index` of `fit_scale_weights`."""
    return fit_scale_weights(table)[index]
