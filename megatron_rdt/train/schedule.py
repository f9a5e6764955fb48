"""Learning rate as a function of the step alone, so that a checkpoint need not hold it."""

import math

from megatron_rdt.config import RunConfig, ScheduleConfig

SMALLEST_JUMP = 0.01  # relative change of the learning rate from which a resumed run says so


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

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


def describe_jump(before: RunConfig, now: RunConfig, step: int) -> list[str]:
    """Return one line on how the learning rate jumps where a run resumes with another schedule; [] if it does not.

    Args:
        before: config of the checkpoint.
        now: config of the run.
        step: steps done.
    """
    if step >= now.train.steps:
        return []
    old, new = (learning_rate(run.schedule, run.optimizer.lr, step, run.train.steps) for run in (before, now))
    if abs(new - old) <= SMALLEST_JUMP * max(old, new):
        return []
    line = f"the learning rate jumps: step {step + 1} has {new:.2e}, by the schedule of the checkpoint it had {old:.2e}"
    decay = before.train.steps - before.schedule.wsd_decay_steps(before.train.steps)
    if before.schedule.name == "wsd" and now.train.steps != before.train.steps and step > decay:
        line += f". The checkpoint is in the decay, which began after step {decay}; one from there or earlier extends the run"
    return [line]
