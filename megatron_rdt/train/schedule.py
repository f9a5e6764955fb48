"""Learning rate as a function of the step alone, so that a checkpoint need not hold it."""

import math

from megatron_rdt.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of one optimizer step.

    Linear warm-up to `peak` over `warmup_steps`, then cosine to final * peak, or flat and then linear to final * peak
    (warmup-stable-decay), or constant.

    Args:
        config: the schedule.
        peak: learning rate after the warm-up.
        step: counted from 0.
        steps: of the whole run.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.name == "constant":
        return peak
    if config.name == "cosine":
        progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        return peak * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    decay = config.wsd_decay_steps(steps)
    remaining = max(steps - step, 0)
    return peak * (config.final + (1 - config.final) * min(remaining / decay, 1.0))
