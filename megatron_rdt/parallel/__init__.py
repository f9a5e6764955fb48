"""Engines: single process, DDP, FSDP2, DeepSpeed ZeRO, behind one interface."""

import importlib

import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.parallel.engine import Engine, MicroBatch

__all__ = ["Engine", "MicroBatch", "make_engine"]

# Module of this package and class of each engine; imported when it is made, since DeepSpeed takes seconds to import.
CLASSES = {
    "single": ("replicated", "SingleEngine"),
    "ddp": ("replicated", "DataParallelEngine"),
    "fsdp": ("fsdp", "FullyShardedEngine"),
    "zero1": ("zero", "ZeroEngine"),
    "zero2": ("zero", "ZeroEngine"),
    "zero3": ("zero", "ZeroEngine"),
}


def make_engine(config: RunConfig, device: torch.device) -> Engine:
    """Create the engine named by `parallel.engine`; with several ranks, join the process group first."""
    module, name = CLASSES[config.parallel.engine]
    engine: type[Engine] = getattr(importlib.import_module(f"megatron_rdt.parallel.{module}"), name)
    return engine(config, device)
