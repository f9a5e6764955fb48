"""Engines on the CPU that are compared: one on every rank, and one process that sees the whole batch."""

import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.parallel import Engine, build_engine

REFERENCE = "single"


def build_on_cpu(config: RunConfig) -> Engine:
    """Build the config's engine; `single` sees the whole batch also inside a process group."""
    engine = build_engine(config, torch.device("cpu"))
    if config.parallel.engine == REFERENCE:
        engine.rank, engine.world_size, engine.layout = 0, 1, Layout()
    return engine


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two tensors, over the largest absolute value of the second."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
