"""Steps that were taken and not yet read: what they left stays on the device until a logging interval ends.

Reading a number from a GPU waits until it has computed everything before. So no step reads one; the records of an
interval are read together, and the device always has the next step to go on with.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rdt.model import CoreMonitor


class StepClock:
    """The time of one step, from before its data was waited for until its last kernel.

    On a GPU the host runs ahead, so its clock says nothing of a step: two events in the stream do, which the GPU
    passes when it gets there. With the GPU behind, a step counts from the end of the one before.

    Args:
        device: where the step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._cuda = device.type == "cuda"
        self._began = self._ended = time.perf_counter()
        self.data_wait_s = 0.0
        self._mark()

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def data_arrived(self) -> None:
        """The host has its batch; `data_wait_s` is how long it waited, whether or not the device was busy."""
        self.data_wait_s = time.perf_counter() - self._began

    def stop(self) -> None:
        """All of the step is computed, or in the stream."""
        self._ended = time.perf_counter()
        self._mark()

    def seconds(self) -> float:
        """Length of the step; on a GPU this waits for its end."""
        if not self._cuda:
            return self._ended - self._began
        first, last = self._events
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@dataclass
class TakenStep:
    """What one step left behind.

    Attributes:
        step: its number, from 1.
        lr: its learning rate.
        losses: of `Engine.forward_backward`, on the device.
        grad_norm: of `Engine.clip`, on the device.
        monitor: of the step.
        experts: of `rebalance`, on the device.
        clock: of the step.
        tokens, tokens_before: of the step, and of all before it.
        flops_share: floating-point operations of the step over what the devices could do in a second; None where
            that is not known.
        depth: loop counts, by the record's fields.
        loop_shares: share of each T, where the monitor measures every iteration.
        memory_gb: peak so far.
        data: how far the run is in each corpus, of `TrainingData.progress`.
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

    def read(self) -> tuple[dict[str, Any], float]:
        """The record for metrics.jsonl, and the objective; waits for the device."""
        losses = {name: float(value) for name, value in self.losses.items()}
        padding = {"padding": losses.pop("padding")} if "padding" in losses else {}
        loss, objective, step_s = losses.pop("cross_entropy"), losses["objective"], self.clock.seconds()
        readings: dict[str, Any] = self.monitor.readings()
        if "iterations" in readings:
            readings["iterations"]["loop_shares"] = self.loop_shares
        record = {
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
            **padding,
            **({} if objective == loss else losses),
            **{name: float(value) for name, value in (self.experts or {}).items()},
        }
        return record, objective
