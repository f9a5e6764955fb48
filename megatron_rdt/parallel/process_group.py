"""Joining the other processes of a run, each with a device of its own."""

from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rdt.config import RunConfig
from megatron_rdt.environment import ProcessPlace, export_for_torch, prefer_deterministic_blas
from megatron_rdt.errors import ConfigError


def join_world(config: RunConfig, place: ProcessPlace) -> torch.device:
    """Pick this process's device and join the process group where the engine needs one."""
    device = pick_device(config.train.device, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.train.deterministic:
            prefer_deterministic_blas()
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    if config.parallel.engine != "single":
        export_for_torch(replace(place, local_rank=device.index) if device.type == "cuda" else place)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.parallel.timeout_s))
    return device


def pick_device(wanted: str, place: ProcessPlace) -> torch.device:
    """The CPU, or the GPU that belongs to this process.

    Args:
        wanted: `train.device`.
        place: of this process.

    Raises:
        ConfigError: there is no GPU, or fewer than processes.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise ConfigError("train.device is cuda, but PyTorch sees no GPU here. Use --train.device cpu.")
    if visible == 1 and place.launcher == "slurm":  # srun may show each process its own GPU only
        return torch.device("cuda", 0)
    if place.local_rank >= visible:
        raise ConfigError(
            f"there are {place.local_world_size} processes on this machine and {visible} GPU(s). Start one process per "
            "GPU, or use --train.device cpu."
        )
    return torch.device("cuda", place.local_rank)
