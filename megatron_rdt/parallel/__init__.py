"""Engines: single process, DDP, FSDP2, DeepSpeed ZeRO, behind one interface."""

import importlib

import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.model import InitialValues, RecurrentDepthTransformer
from megatron_rdt.parallel.engine import Engine, MicroBatch, WrittenState

__all__ = ["Engine", "MicroBatch", "WrittenState", "build_engine", "make_engine"]

# Engine -> module of this package and class; imported when it is created, since DeepSpeed takes seconds to import.
CLASSES = {
    "single": ("replicated", "SingleEngine"),
    "ddp": ("replicated", "DataParallelEngine"),
    "fsdp": ("fsdp", "FullyShardedEngine"),
    "zero1": ("zero", "ZeroEngine"),
    "zero2": ("zero", "ZeroEngine"),
    "zero3": ("zero", "ZeroEngine"),
}


def make_engine(config: RunConfig, device: torch.device) -> Engine:
    """Create the engine that `parallel.engine` names, without a model; several ranks must be in a process group."""
    module, name = ("ring_engine", "RingEngine") if config.parallel.core_ring > 1 else CLASSES[config.parallel.engine]
    engine: type[Engine] = getattr(importlib.import_module(f"megatron_rdt.parallel.{module}"), name)
    return engine(config, device)


def build_engine(config: RunConfig, device: torch.device, values: InitialValues | None = None) -> Engine:
    """Create the engine that `parallel.engine` names and set it up with a new model of the config, as in `Engine.setup`."""
    engine = make_engine(config, device)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    engine.setup(model, values)
    return engine
