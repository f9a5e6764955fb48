"""Format a run plan as text for a terminal, and as data for JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megatron_rdt.planner.balance import expert_load
from megatron_rdt.planner.collective_time import collective_seconds
from megatron_rdt.planner.ring import ring_bubbles
from megatron_rdt.planner.run_plan import USABLE_MEMORY, RunPlan
from megatron_rdt.planner.step_time import DAY, HOUR, StepTime
from megatron_rdt.terminal import align_columns, format_count, format_duration

GB, TERA = 1e9, 1e12
SHOWN_CHANGES = 10


def format_plan(plan: RunPlan, utilisation: float, tokens: float, price: float) -> str:
    """Format all sections of a run plan as one text: parameters, work, memory, communication, time.

    Args:
        plan: the run plan.
        utilisation: share of the peak rate that it assumed; 0: that of the kernels.
        tokens: budget of the run.
        price: price of one device for an hour; 0 omits the cost.
    """
    sections = (_format_parameters(plan), _format_work(plan), _format_memory(plan), _format_communication(plan))
    return "\n\n".join((*sections, _format_time(plan, utilisation, tokens, price)))


def _format_table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> str:
    """Return a table as text, every line indented."""
    return "\n".join(indent + line for line in align_columns(rows))


def _format_parameters(plan: RunPlan) -> str:
    """Format the section on parameters."""
    total = sum(plan.parts.values())
    rows = [(name, f"{size:,}", f"{100 * size / total:.1f} %") for name, size in plan.parts.items()]
    rows += [("all", f"{total:,}", ""), ("active per token", f"{plan.active:,}", "")]
    return "Parameters\n" + _format_table(rows)


def _format_work(plan: RunPlan) -> str:
    """Format the section on loop counts and operations."""
    work, config = plan.work, plan.config
    k = "all iterations" if plan.with_grad == plan.loops else f"the last {config.depth.backprop}"
    again = f", and {100 * work.again / work.per_step:.0f} % more for checkpointing" if work.again else ""
    return (
        f"Work\n  mean T {plan.loops:.2f}, gradient through {k} ({plan.with_grad:.2f} on average)\n"
        f"  {work.per_token / 1e9:.4g} GFLOP per token, {work.per_step / TERA:.4g} TFLOP per step of "
        f"{plan.tokens:,} tokens{again}\n"
        f"  {_format_micro_batches(plan, config.train.global_batch)}"
    )


def _format_memory(plan: RunPlan) -> str:
    """Format the section on memory, with options that would save some."""
    memory, device, layout = plan.memory, plan.device, plan.layout
    k = f", the last {plan.deepest.with_grad} with gradient" if plan.deepest.with_grad < plan.deepest.loops else ""
    large = {kind: size for kind, size in memory.parts.items() if size >= 0.005 * GB or size == memory.peak}
    rows = [(kind, f"{size / GB:.2f} GB") for kind, size in (*large.items(), ("peak", memory.peak))]
    axes = [f"{name} {getattr(layout, name)}" for name in ("replicate", "shard", "context", "tensor", "expert")]
    axes += [f"ring {layout.ring} stages of {layout.stage_ranks}"] * (layout.ring > 1)
    lines = [
        f"Peak memory per device, at T = {plan.deepest.loops}{k}; reached in: {memory.moment}",
        f"  {layout.world_size} x {device.name}, engine {plan.config.parallel.engine}: {', '.join(axes)}",
        _format_table(rows),
        f"  {plan.usual.peak / GB:.2f} GB at the mean T",
    ]
    limit = USABLE_MEMORY * device.memory / GB
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(f"  {verdict} into {limit:.1f} GB ({100 * USABLE_MEMORY:.0f} % of {device.memory / GB:.1f} GB)")
    if plan.changes:
        lines.append("  What would take less:" if not plan.fits else "  What would take less, if need be:")
        shown = plan.changes[:SHOWN_CHANGES]
        saved = [(c.words, f"{(memory.peak - c.memory.peak) / GB:+.2f} GB".replace("+", "-")) for c in shown]
        now = [f"{c.memory.peak / GB:.2f} GB{', fits' if c.memory.peak / GB <= limit else ''}" for c in shown]
        lines.append(_format_table([(*pair, last) for pair, last in zip(saved, now)], "    "))
    if not plan.fits and not any(change.memory.peak / GB <= limit for change in plan.changes):
        lines.append("  None of them is enough alone: give several, and see the next plan.")
    return "\n".join(lines)


def _format_communication(plan: RunPlan) -> str:
    """Format the section on collectives; those of one purpose and kind share a line."""
    if not plan.sent:
        return "Communication\n  none"
    merged: dict[tuple[str, str, str, bool], list[float]] = {}
    for each in plan.sent:
        row = merged.setdefault((each.purpose, each.kind, each.axis, each.hidden), [0, 0.0, 0.0])
        row[0] += each.calls
        row[1] += each.size
        row[2] += collective_seconds(each, plan.layout, plan.device, expert_load(plan.config, plan.layout))
    rows = [("what", "collective", "among", "calls", "GB", "time", "")]
    for (purpose, kind, axis, hidden), (calls, size, time) in merged.items():
        overlap = "beside computing" if hidden else "waits"
        rows.append((purpose, kind, axis, str(calls), f"{size / GB:.3f}", format_duration(time), overlap))
    return "Communication of a step, per process, at the mean T\n" + _format_table(rows)


def _format_time(plan: RunPlan, utilisation: float, tokens: float, price: float) -> str:
    """Format the section on the time of a step and the time and cost of the tokens, or say why it is not known."""
    if plan.time is None:
        return (
            "Time\n  not known: the peak rates are those of bfloat16, and train.precision is "
            f"{plan.config.train.precision}. Set --train.precision bfloat16."
        )
    time, world = plan.time, plan.layout.world_size
    lines = [
        f"Time of a step, of {world} x {plan.device.name} at {plan.device.peak_flops / TERA:,.4g} TFLOP/s",
        f"  at least {format_duration(time.bound)}: {format_duration(time.computing)} computing at the peak rate, "
        f"{format_duration(time.hidden)} of communication beside it, {format_duration(time.exposed)} of communication "
        f"that waits; MFU at most {100 * time.mfu_bound:.1f} %",
        f"  expected {format_duration(time.expected)}: {plan.tokens / time.expected:,.0f} tokens/s, "
        f"MFU {100 * time.mfu:.1f} %; of it",
        _format_table(_list_time_parts(plan, time, utilisation), "    "),
    ]
    if len(plan.seconds) > 1:
        lines.append("  other global batches of train.batch_schedule, expected:")
        rows = [(f"batch {b:,}", format_duration(s), _format_micro_batches(plan, b)) for b, s in plan.seconds.items()]
        lines.append(_format_table(rows[:-1], "    "))
    for name, amount in (("the run", float(plan.run_tokens)), ("the budget", tokens)):
        if amount:
            steps, seconds = plan.steps_and_seconds(amount)
            cost = f", {world * seconds / HOUR:,.0f} device hours"
            cost += f", {world * seconds / HOUR * price:,.0f} at {price:g} each" if price else ""
            lines.append(
                f"  {name}, {format_count(amount)} tokens: {steps:,.0f} steps, {seconds / DAY:,.2f} days{cost}"
            )
    return "\n".join(lines)


def _list_time_parts(plan: RunPlan, time: StepTime, utilisation: float) -> list[tuple[str, str]]:
    """List the parts of the expected time, with words for each."""
    what = f"operations at {100 * utilisation:.0f} % of the peak rate" if utilisation else "kernels on the device"
    parts = [(what, time.kernels)]
    if time.launches > time.kernels:
        parts.append(("launches by the host beyond that", time.launches - time.kernels))
    parts += [
        ("waits for communication beside computing", time.stalled),
        ("waits for other communication", time.exposed),
    ]
    if plan.config.depth.scheme == "difficulty":
        parts.append(("waits for the deepest process, which only the data knows", math.nan))
    elif plan.layout.ring > 1:
        forward, backward = (f"{100 * bubble:.1f} %" for bubble in ring_bubbles(plan.config, plan.layout))
        parts.append((f"bubble of the ring, {forward} of its ticks forward and {backward} backward", time.idle))
    elif time.idle:
        parts.append(("waits for the process with the most iterations", time.idle))
    return [(words, "not known" if math.isnan(seconds) else format_duration(seconds)) for words, seconds in parts]


def _format_micro_batches(plan: RunPlan, batch: int) -> str:
    """Format how many micro-batches a device has in a step of this global batch."""
    return f"{batch // (plan.config.train.micro_batch * plan.layout.data)} micro-batches per device and step"


def plan_to_dict(plan: RunPlan, tokens: float) -> dict[str, Any]:
    """Return the plan, and the days that the run and `tokens` take, as data that JSON can hold, one key per section."""

    def days(tokens: float) -> float | None:
        return plan.steps_and_seconds(tokens)[1] / DAY if plan.seconds else None

    load = expert_load(plan.config, plan.layout)
    return {
        "device": dataclasses.asdict(plan.device),
        "layout": dataclasses.asdict(plan.layout) | {"devices": plan.layout.world_size},
        "parameters": {**plan.parts, "all": sum(plan.parts.values()), "active": plan.active},
        "depth": {"mean": plan.loops, "mean_with_grad": plan.with_grad, "planned": dataclasses.asdict(plan.deepest)},
        "flops": dataclasses.asdict(plan.work),
        "memory": {**dataclasses.asdict(plan.memory), "at_mean": plan.usual.peak, "fits": plan.fits},
        "communication": [
            dataclasses.asdict(each) | {"seconds": collective_seconds(each, plan.layout, plan.device, load)}
            for each in plan.sent
        ],
        "time": None if plan.time is None else dataclasses.asdict(plan.time),
        "step_seconds": {str(batch): seconds for batch, seconds in plan.seconds.items()},
        "run": {"steps": plan.config.train.steps, "tokens": plan.run_tokens, "days": days(plan.run_tokens)},
        "budget": {"tokens": tokens, "days": days(tokens)},
        "changes": [{"words": change.words, "memory": change.memory.peak} for change in plan.changes],
    }
