"""Arguments of a model's forward pass: the plan that they ask for, what they exclude, positions whose logits are kept."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace
from megatron_rdt.model.monitor import CoreMonitor

LogitsToKeep = int | Tensor | None
"""Positions whose logits a forward pass computes, see `select_positions`; None for features in their place."""


def make_depth_plan(
    sequences: int, depth: DepthPlan | int | None = None, loops: int | Sequence[int] | None = None
) -> DepthPlan:
    """Return the plan for a batch of `sequences` that the arguments `depth` or `loops` of a forward pass ask for.

    Of several loop counts it is that of the largest.

    Raises:
        ValueError: both or neither are given, the plan is for another number of sequences, T is no whole number of at
            least 1, or several do not rise.
    """
    if (depth is None) == (loops is None):
        given = "neither" if depth is None else "both"
        raise ValueError(f"{given} of depth and loops given; pass exactly one, such as model(tokens, loops=8)")
    if isinstance(depth, DepthPlan):
        if len(depth.iterations) != sequences:
            raise ValueError(f"the plan is for {len(depth.iterations)} sequences, the batch has {sequences}")
        return depth
    if isinstance(loops, Sequence) and not isinstance(loops, str):  # a string's elements are strings again
        plans = [make_depth_plan(sequences, loops=each) for each in loops]
        if not plans or [*loops] != sorted({*loops}):
            raise ValueError(f"loops are {[*loops]}; give one T, or several that rise")
        return plans[-1]
    name, number, others = ("loops", loops, "") if depth is None else ("the depth", depth, ", or a DepthPlan")
    if isinstance(number, bool) or not isinstance(number, Integral) or int(number) < 1:
        raise ValueError(f"{name} is {number!r}; give a whole number of iterations of at least 1{others}")
    return DepthPlan.constant(int(number), sequences)


def select_positions(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return some positions of (batch, sequence, channels), as transformers' argument of this name says.

    Args:
        x: features or logits.
        logits_to_keep: the last n positions, 0 for all; or positions (kept,) of all rows or (batch, kept) of each; or
            booleans (batch, sequence), whose positions are returned as (kept, channels).
    """
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return x[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return x[torch.arange(len(x), device=x.device)[:, None], logits_to_keep]
    return x[:, logits_to_keep]


def kept_iterations(loops: int, budget: int) -> int:
    """Return how many of T = `loops` iterations have cache slots of their own; a budget of 0 means all."""
    return min(budget or loops, loops)


def check_arguments(
    tokens: Tensor,
    loops: int | Sequence[int] | None,
    targets: Tensor | None,
    exit_rule: ExitRule | None,
    trace: ExitTrace | None,
    monitor: CoreMonitor | None,
    states: list[Tensor] | None,
    logits_to_keep: LogitsToKeep,
) -> None:
    """Raise ValueError for arguments of a forward pass that exclude each other, or tokens of another shape."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give (batch, sequence)")
    if tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}: there is none. Give at least one")
    if targets is not None and exit_rule is not None and exit_rule.kind != "fixed":
        raise ValueError("an exit rule is for inference; omit the targets and compare with the logits")
    measures_only = targets is not None and trace is None and monitor is None and not torch.is_grad_enabled()
    if isinstance(loops, Sequence) and not isinstance(loops, str) and not measures_only:
        raise ValueError(
            "several loop counts are for measuring losses: pass targets, no trace and no monitor, and call the model "
            "under torch.no_grad()"
        )
    if exit_rule is not None and exit_rule.predicts and (states is not None or logits_to_keep is None):
        raise ValueError(f"the exit rule {exit_rule.kind} runs the coda in every iteration and returns logits alone")
