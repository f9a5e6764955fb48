"""A preset's fastest plan on some number of GPUs, for a step of a size that is usual there."""

from pathlib import Path
from typing import Any

from megatron_rdt.config import load_config
from megatron_rdt.devices import DEVICES, Device
from megatron_rdt.planner.run_plan import RunPlan
from megatron_rdt.planner.search import find_fastest_plan

SMALL_STEP, LARGE_STEP = 4 * 2**20, 16 * 2**20


def step_tokens(devices: int) -> int:
    """Tokens of a step on so many devices."""
    return SMALL_STEP if devices <= 512 else LARGE_STEP


def plan_preset(path: Path, devices: int, device: Device = DEVICES["h100"]) -> RunPlan | None:
    """Return the fastest plan of a preset's file on so many devices, with its published length; None if none fits.

    AdamW for all: Muon is refused with tensor parallelism, which the search tries. Huginn drew one T for the micro-batches
    that all ranks ran at a time.
    """
    length = load_config(path).train.sequence_length
    options = {"sequence_length": length, "global_batch": step_tokens(devices) // length, "precision": "bfloat16"}
    fixed: dict[str, Any] = {"train": options, "optimizer.name": "adamw"}
    config = load_config(path, fixed | ({"depth.per": "accumulation_step"} if "huginn" in path.stem else {}))
    return find_fastest_plan(config, devices, device)
