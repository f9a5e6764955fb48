"""Floating-point operations of a forward and backward pass, from the config and the iterations that were run.

A multiply and an add are two operations. A forward pass costs 2 per weight of a matrix and token (of experts, those that
a token is sent to), plus attention's two products over the keys that a query sees. A backward pass costs twice its
forward. Iterations without gradient cost their forward only; recomputation by checkpointing is not counted (MFU).
"""

from dataclasses import dataclass

import torch
from torch import nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.gqa import TokenValues
from megatron_rdt.model.iteration_signals import AdaLnSignal
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.model.rdt import RecurrentDepthTransformer

BACKWARD_FACTOR = 2


@dataclass(frozen=True)
class ForwardFlops:
    """Operations per token of the parts of a forward pass.

    Attributes:
        prelude: the prelude's layers; the embedding is a look-up and costs nothing.
        iteration: one iteration of the core.
        around: the core's products that run once per pass.
        coda: the coda's layers and the output matrix.
    """

    prelude: float
    iteration: float
    around: float
    coda: float


def matrix_weights(module: nn.Module) -> float:
    """Count a module's matrix weights that multiply each token: of experts only its own; look-ups count nothing."""
    total = 0.0
    for part in module.modules():
        if isinstance(part, TokenValues | AdaLnSignal):  # a look-up; a product per sequence, not per token
            continue
        share = part.experts_per_token / part.experts if isinstance(part, MixtureOfExperts) else 1.0
        for weight in part.parameters(recurse=False):
            # Three dimensions are experts' matrices, one is a norm, a bias or a decay.
            total += weight.numel() * (share if weight.dim() == 3 else 1.0 if weight.dim() == 2 else 0.0)
    return total


def mean_keys(config: ModelConfig, sequence: int) -> float:
    """Return the mean number of keys that a causal query sees, itself included, within a window if there is one."""
    window = min(config.window or sequence, sequence)
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence


def attention_flops(config: ModelConfig, sequence: int) -> float:
    """Return the operations per token of one layer's scores and weighted values."""
    mla = config.attention == "mla"
    channels = config.nope_dim + config.rope_dim + config.value_dim if mla else 2 * config.head_dim
    return 2 * config.heads * channels * mean_keys(config, sequence)


def forward_flops(config: ModelConfig, sequence: int) -> ForwardFlops:
    """Return the operations per token of a forward pass over sequences of this length."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    attention = attention_flops(config, sequence)

    def layers_flops(modules: nn.ModuleList) -> float:
        return sum(2 * matrix_weights(layer) + attention for layer in modules)

    core = model.core
    injection, precomputed = 2 * matrix_weights(core.injection), core.injection.PRECOMPUTED_SHARE
    around = sum(2 * matrix_weights(part) for part in (core.input_matrix, core.output_matrix) if part is not None)
    around += precomputed * injection
    iteration = layers_flops(core.layers) + (1 - precomputed) * injection + 2 * matrix_weights(core.signals)
    head = 2 * config.vocab_size * config.dim
    return ForwardFlops(layers_flops(model.prelude), iteration, around, layers_flops(model.coda) + head)


def training_flops(config: ModelConfig, forward: ForwardFlops, loops: float, loops_with_grad: float) -> float:
    """Return a training pass's operations per token: all T iterations forward, those with grad also backward.

    Args:
        config: of the model.
        forward: from `forward_flops`.
        loops: T, or its mean over sequences.
        loops_with_grad: min(k, T), or its mean.
    """
    codas = loops if config.halting == "gate" else 1  # the gate's objective reads every iteration out
    once = forward.prelude + forward.around + codas * forward.coda
    return (1 + BACKWARD_FACTOR) * once + (loops + BACKWARD_FACTOR * loops_with_grad) * forward.iteration
