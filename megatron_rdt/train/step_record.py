"""Metrics of recent steps, kept on the device until the end of a logging interval, so that no step waits for the GPU.

Reading a number from a GPU waits until it has computed everything before. So a step reads none; the records of an
interval are read together, while the host has already queued the next step.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import CoreMonitor


class StepClock:
    """The duration of one step, from before the wait for its data until its last kernel.

    On a GPU the host runs ahead, so its clock does not measure a step; two events in the stream do, which the GPU
    passes when it gets there. While the GPU is behind, a step counts from the end of the one before.

    Args:
        device: where the step computes.

    Attributes:
        data_wait_s: how long the host waited for its batch, whether or not the device was busy.
        prepare_s: how long the host took from there to the forward pass, without a wait for another rank.
        iterations: sum of T over this rank's sequences.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began, self.data_wait_s, self.prepare_s, self.iterations = time.perf_counter(), 0.0, 0.0, 0
        self._core: list[float | torch.cuda.Event] = []  # begin and end of each forward pass of the core
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._first = self._last = self._take_time()

    def _take_time(self) -> float | torch.cuda.Event:
        """Return the time now or, on a GPU, an event that marks this place in its stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark_data_arrival(self) -> None:
        """Set `data_wait_s` to the time since the clock was made: the host has its batch."""
        self.data_wait_s = time.perf_counter() - self._began

    def start_forward(self, core: nn.Module, plans: Sequence[DepthPlan]) -> None:
        """Set `prepare_s` and `iterations`, and time the core's forward passes from here until `stop`.

        An engine that shards has gathered the core's weights before the hooks of this clock, which came later, are called.
        """
        self.prepare_s = time.perf_counter() - self._began - self.data_wait_s
        self.iterations = sum(plan.total_loops for plan in plans)

        def mark(*_: Any) -> None:
            self._core.append(self._take_time())

        self._hooks = [core.register_forward_pre_hook(mark), core.register_forward_hook(mark)]

    def stop(self) -> None:
        """Note that the step has ended, or that all of its kernels are in the stream."""
        self._last = self._take_time()
        for hook in self._hooks:
            hook.remove()

    def read_seconds(self) -> float:
        """Duration of the step in seconds; on a GPU this waits for the step's end."""
        return _measure_seconds(self._first, self._last)

    def read_own_work(self) -> tuple[float, float, float, float]:
        """Return `data_wait_s`, `prepare_s`, the seconds in the core's forward passes, and `iterations`; waits as well."""
        core_s = sum(_measure_seconds(first, last) for first, last in zip(self._core[::2], self._core[1::2]))
        return self.data_wait_s, self.prepare_s, core_s, self.iterations


def _measure_seconds(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    """Return the seconds between two times, or two events of a GPU, for the second of which this waits."""
    if isinstance(first, float) or isinstance(last, float):
        return last - first  # type: ignore[operator]
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@dataclass
class StepRecord:
    """Everything to record about one step; its tensors are still on the device.

    Attributes:
        step: its number, from 1.
        lr: its learning rate.
        losses: as `Engine.forward_backward` returned them, on the device.
        grad_norm: as `Engine.clip` returned it, on the device.
        monitor: measurements of the loop, on the device.
        experts: load and balance as `rebalance` returned them, on the device; None without experts.
        clock: of the step.
        tokens: trained on in this step.
        tokens_before: trained on in all steps before.
        flops_share: floating-point operations of the step over what all devices can do in a second; None if unknown.
        depth: loop counts, by field of the record.
        loop_shares: share of each T, where the monitor measures every iteration.
        memory_gb: peak memory so far.
        data: fields from `TrainingData.progress`.
    """

    step: int
    lr: float
    losses: dict[str, torch.Tensor]
    grad_norm: torch.Tensor
    monitor: CoreMonitor
    experts: dict[str, torch.Tensor] | None
    clock: StepClock
    tokens: int
    tokens_before: int
    flops_share: float | None
    depth: dict[str, Any]
    loop_shares: dict[str, float] | None
    memory_gb: float
    data: dict[str, Any]

    def read_metrics(self) -> tuple[dict[str, Any], float]:
        """Wait for the device; return the object for metrics.jsonl, and the objective."""
        losses = {name: float(value) for name, value in self.losses.items()}
        about_data: dict[str, Any] = {"padding": losses.pop("padding")} if "padding" in losses else {}
        about_data |= {name: round(losses.pop(name)) for name in ("targets", "unreadable_samples") if name in losses}
        loss, objective, step_s = losses.pop("cross_entropy"), losses["objective"], self.clock.read_seconds()
        # Where nothing is added to the cross entropy, the objective would only repeat the loss.
        extra = {} if objective == loss else losses
        if about_data.get("targets") == 0:  # a mean over no target
            loss, extra = math.nan, dict.fromkeys(extra, math.nan)
        readings: dict[str, Any] = self.monitor.readings()
        if "iterations" in readings:
            readings["iterations"]["loop_shares"] = self.loop_shares
        metrics = {
            "step": self.step,
            "tokens": self.tokens_before + self.tokens,
            "loss": loss,
            "lr": self.lr,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": self.tokens / step_s,
            "mfu": None if self.flops_share is None else self.flops_share / step_s,
            **self.depth,
            **readings,
            "memory_gb": self.memory_gb,
            "data_wait_s": self.clock.data_wait_s,
            "step_s": step_s,
            **self.data,
            **about_data,
            **extra,
            **{name: float(value) for name, value in (self.experts or {}).items()},
        }
        return metrics, objective
