"""Engines: single process, DDP, FSDP2, DeepSpeed ZeRO, behind one interface."""

import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.parallel.engine import Engine, MicroBatch

__all__ = ["Engine", "MicroBatch", "make_engine"]


def make_engine(config: RunConfig, device: torch.device) -> Engine:
    """The engine that `parallel.engine` names; the process group exists already where there are several ranks."""
    name = config.parallel.engine
    if name == "single":
        from megatron_rdt.parallel.replicated import SingleEngine

        return SingleEngine(config, device)
    if name == "ddp":
        from megatron_rdt.parallel.replicated import DataParallelEngine

        return DataParallelEngine(config, device)
    if name == "fsdp":
        from megatron_rdt.parallel.fsdp import FullyShardedEngine

        return FullyShardedEngine(config, device)
    from megatron_rdt.parallel.zero import ZeroEngine

    return ZeroEngine(config, device)
