"""Floating-point operations of what was really executed.

A multiply and an add are two operations. A forward pass costs 2 per weight of a matrix and token, plus attention's
two products over the keys that a causal query sees, (sequence + 1) / 2 on average. A backward pass costs twice its
forward. Iterations without gradient cost their forward only; recomputation by checkpointing is not counted (MFU).
"""

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.feedforward import ffn_width

BACKWARD_FACTOR = 2


def layer_forward_flops(config: ModelConfig, sequence: int) -> float:
    """Per token and layer, forward."""
    head_dim = config.dim // config.heads
    attention_weights = 2 * config.dim * head_dim * (config.heads + config.kv_heads)
    weights = attention_weights + 3 * config.dim * ffn_width(config)
    return 2 * weights + 4 * config.dim * (sequence + 1) / 2


def training_flops(config: ModelConfig, sequence: int, loops: int, loops_with_grad: int) -> float:
    """Per token, forward and backward, for T = `loops` of which the last `loops_with_grad` carry gradient."""
    layer = layer_forward_flops(config, sequence)
    once = (config.prelude_layers + config.coda_layers) * layer + 2 * config.vocab_size * config.dim
    core = config.core_layers * layer
    return (1 + BACKWARD_FACTOR) * once + (loops + BACKWARD_FACTOR * loops_with_grad) * core


def forward_flops(config: ModelConfig, sequence: int, loops: int) -> float:
    """Per token, forward only."""
    layer = layer_forward_flops(config, sequence)
    layers = config.prelude_layers + loops * config.core_layers + config.coda_layers
    return layers * layer + 2 * config.vocab_size * config.dim
