"""Hyper-connections over iterations: N lanes of state, mixed, read and written with learned weights.

After Zhu et al. 2024 (arXiv:2409.19606), across iterations instead of layers, and with lanes that decay:

    u_n = decay * sum_m P_nm h_m + gain * e       P = softmax over m of `mix`, (lanes, lanes)
    x   = sum_n a_n u_n                           a = softmax of `read_weights`
    h_n' = u_n + b_n (layers(x) - x)              b = `write_weights`

Rows of P sum to 1, so the linear part h -> u is bounded by the largest |decay| < 1 in the maximum norm over lanes, for
every value of the parameters. The coda reads sum_n a_n h_n.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import add_offset
from megatron_rdt.model.injection.diagonal import DecayingInjection
from megatron_rdt.model.linear import identity_values


def _initial_write_weights(shape: torch.Size, index: Tensor) -> Tensor:
    """Return write weights from 0.5 to 1.5, 1 for one lane.

    They differ between lanes, since equal lanes would get equal gradients and stay equal for ever.
    """
    return 0.5 + index.double() / (shape[0] - 1) if shape[0] > 1 else torch.ones_like(index)


def _softmax_in(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax over the last dimension, computed in `dtype`; in bfloat16 it could sum to more than 1."""
    return logits.to(dtype).softmax(-1)


class HyperInjection(DecayingInjection, name="hyper"):
    """N lanes; the state of the loop is (batch, sequence, lanes, dim).

    The largest |decay| is the radius of decay * P too: rows of P are positive and sum to 1, so its own radius is 1.
    """

    INITIAL_VALUES: ClassVar[dict[str, object]] = {
        "mix": identity_values,  # logits of P, by which each lane keeps about half of itself
        "read_weights": 0.0,
        "write_weights": _initial_write_weights,
    }

    READS_CARRY = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.lanes = config.lanes
        self.mix = nn.Parameter(torch.empty(config.lanes, config.lanes))
        self.read_weights = nn.Parameter(torch.empty(config.lanes))
        self.write_weights = nn.Parameter(torch.empty(config.lanes))

    def expand(self, state: Tensor) -> Tensor:
        """Copy the state into every lane."""
        return state.unsqueeze(-2).expand(*state.shape[:-1], self.lanes, state.shape[-1])

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mix and decay lanes, add the input; return their weighted mean plus offset, and the lanes as carry."""
        decay, _ = self.diagonal()
        mixed = torch.einsum("nm,bsmd->bsnd", _softmax_in(self.mix, decay.dtype), state.to(decay.dtype))
        lanes = decay * mixed + precomputed.unsqueeze(-2)
        return add_offset(self.collapse(lanes), offset), lanes

    def update(self, carry: Tensor, output: Tensor) -> Tensor:
        """Return the lanes, each moved by its write weight times the layers' change of the weighted mean."""
        change = (output - self.collapse(carry)).unsqueeze(-2)
        return carry + self.write_weights[:, None] * change

    def collapse(self, state: Tensor) -> Tensor:
        """Return the weighted mean of the lanes."""
        return torch.einsum("n,bsnd->bsd", _softmax_in(self.read_weights, state.dtype), state)
