"""The loop ring on four processes: ticks, bubble and bytes as the schedule computes them and as measured, and a picture.

Each process holds a quarter of a small model's core. Four processes share the cores of this machine, so in every visit
a process also sleeps, as a host does whose device computes: 0.2 s forward, 0.4 s backward (`--pause`). The bubble that is
measured is the share of the time from the first to the last visit of a pass in which a process has none, the mean over
processes; bytes are those that a process hands to `send`, the largest of the four.

    python benchmarks/loop_ring.py [--pause 0.2] [--picture docs/images/loop_ring.png] [--out FILE.json]
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from tools.options import make_parser, write_numbers
from tools.processes import run_ranks
from tools.tables import format_header, format_row

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.environment import leave_process
from megatron_rdt.evaluate.plots import COLOURS, DPI, save_figure
from megatron_rdt.parallel import Engine, MicroBatch, build_engine
from megatron_rdt.parallel.collective_counter import record_collectives
from megatron_rdt.parallel.ring_engine import RingEngine
from megatron_rdt.parallel.ring_schedule import schedule_ring

STAGES, DIM, LENGTH, FLOAT32 = 4, 64, 32, 4
MODEL = ModelConfig(vocab_size=64, dim=DIM, prelude_layers=1, core_layers=STAGES, coda_layers=1, heads=4, kv_heads=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One step: T of the sequences of each process, and k.

    Attributes:
        loops: T of each sequence, by process.
        k: iterations with gradient; None for all.
    """

    loops: tuple[tuple[int, ...], ...]
    k: int | None

    def laps(self, backwards: bool) -> list[int]:
        """Return the laps of every sequence in a pass."""
        every = [loops for each in self.loops for loops in each]
        return [min(loops, self.k) for loops in every] if backwards and self.k else every


CASES = {
    "one sequence each, T = 4": Case(((4,),) * STAGES, None),
    "one sequence each, T = 16, k = 4": Case(((16,),) * STAGES, 4),
    "two sequences each, T = 4": Case(((4, 4),) * STAGES, None),
    "two sequences each, T drawn, k = 2": Case(((3, 1), (2, 4), (1, 2), (5, 2)), 2),
    "four sequences each, T drawn, k = 2": Case(((3, 1, 2, 2), (2, 4, 1, 3), (1, 2, 7, 2), (5, 2, 1, 3)), 2),
}
DRAWN = "two sequences each, T drawn, k = 2"  # the case of the picture


class _Pause(torch.autograd.Function):
    """The identity, which takes a time forward and twice that time backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grads[0], None


def build(case: Case, pause: float) -> RingEngine:
    """Build the engine of this process, whose visits take a time of their own."""
    sequences = len(case.loops[0])
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(global_batch=STAGES * sequences, micro_batch=sequences, sequence_length=LENGTH),
        parallel=ParallelConfig(engine="fsdp", core_ring=STAGES),
    )
    engine = build_engine(config, torch.device("cpu"))
    assert isinstance(engine, RingEngine)
    layer = engine.model.core.layers[engine.ring.layers.start]
    layer.register_forward_pre_hook(lambda _, inputs: (_Pause.apply(inputs[0], pause), *inputs[1:]))
    return engine


def measure_case(engine: Engine, case: Case) -> dict[str, Any]:
    """Take steps; return the visits of the last one and the bytes that this process sent in it."""
    assert isinstance(engine, RingEngine)
    loops = case.loops[engine.rank]
    batch = [
        MicroBatch(
            Batch(torch.zeros(len(loops), LENGTH + 1, dtype=torch.int64)), DepthPlan(loops, case.k, (), case.loops)
        )
    ]
    record_collectives(engine, batch)  # the first step sets things up
    engine.ring.trace = []
    calls = record_collectives(engine, batch)
    sent = {phase: sum(call.size for call in calls if call.kind == "send" and call.phase == phase) for phase in PHASES}
    return {"visits": [dataclasses.asdict(visit) for visit in engine.ring.trace], "sent": sent}


PHASES = ("forward", "backward")


def run_worker(options: argparse.Namespace) -> None:
    """Measure every case as one of the processes; the first writes what all found to --worker; end the process."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    for name, case in CASES.items():
        found[name] = [None] * STAGES
        dist.all_gather_object(found[name], measure_case(build(case, options.pause), case))
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps(found))
    dist.barrier()
    leave_process(0)


def measured_bubble(visits: Sequence[dict[str, Any]]) -> float:
    """Return the share of a pass in which a stage computes no visit, the mean over stages."""
    span = max(v["end"] for v in visits) - min(v["begin"] for v in visits)
    return 1 - sum(v["end"] - v["begin"] for v in visits) / (STAGES * span)


def compare_pass(case: Case, phase: str, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return ticks, bubble and bytes of a pass, as computed and as measured."""
    backwards = phase == "backward"
    sequences = len(case.loops[0])
    owners = [stage for stage in range(STAGES) for _ in range(sequences)]
    schedule = schedule_ring(STAGES, case.laps(backwards), owners)
    state = FLOAT32 * LENGTH * DIM
    sizes = {"enter": 2 * state, "hop": state, "leave": state if backwards else 2 * state}
    sent = [schedule.count_sent(stage, backwards) for stage in range(STAGES)]
    visits = [visit for rank in ranks for visit in rank["visits"] if visit["phase"] == phase]
    ticks = {visit["tick"] for visit in visits}
    return {
        "ticks": (schedule.ticks, max(ticks) - min(ticks) + 1),
        "bubble": (schedule.bubble, measured_bubble(visits)),
        "bytes": (
            max(sum(sizes[kind] * number for kind, number in each.items()) for each in sent),
            max(rank["sent"][phase] for rank in ranks),
        ),
    }


def draw_trace(ranks: Sequence[dict[str, Any]], case: Case, path: Path) -> Path:
    """Draw every visit of a step as a box: stage against time, coloured by sequence."""
    visits = [visit for rank in ranks for visit in rank["visits"]]
    start = min(visit["begin"] for visit in visits)
    _, axes = plt.subplots(figsize=(15, 3.6), dpi=DPI, layout="constrained")
    for visit in visits:
        draw_visit(axes, visit, start)
    loops = [loops for each in case.loops for loops in each]
    names = ", ".join(f"{letter(i)} {t}" for i, t in enumerate(loops))
    axes.set(
        title=f"A step of a loop ring of {STAGES} stages; T of the sequences: {names}; k = {case.k}",
        xlabel="seconds; number: iteration; pale: without gradient; in italics: the backward pass",
        yticks=range(STAGES),
        yticklabels=[f"stage {stage}" for stage in range(STAGES)],
        ylim=(STAGES - 0.45, -0.55),
    )
    axes.margins(x=0.005)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(axes, path)


def draw_visit(axes: Axes, visit: dict[str, Any], start: float) -> None:
    """Draw one visit, with its sequence's letter and its iteration."""
    sequence, lap = visit["visit"]["sequence"], visit["visit"]["lap"]
    begin, end, backwards = visit["begin"] - start, visit["end"] - start, visit["phase"] == "backward"
    colour = (*COLOURS[:6], "#999999", "#F0E442")[sequence]
    alpha = 1.0 if visit["has_grad"] else 0.45
    axes.barh(visit["stage"], end - begin, 0.86, begin, color=colour, alpha=alpha, edgecolor="white", linewidth=0.8)
    style = "italic" if backwards else "normal"
    text = f"{letter(sequence)}\n{lap + 1}"
    axes.text((begin + end) / 2, visit["stage"], text, ha="center", va="center", fontsize=7, style=style)


def letter(sequence: int) -> str:
    """Return the letter of a sequence in the picture."""
    return "ABCDEFGHIJKLMNOP"[sequence]


def main() -> None:
    """Measure on four processes; print a row per case and pass; draw the picture."""
    parser = make_parser(__doc__, out=None)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds that a forward visit takes besides computing")
    parser.add_argument("--picture", type=Path, help="draw the trace of a step with drawn T here")
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    options = parser.parse_args()
    if options.worker:
        run_worker(options)
        return
    found = run_ranks(__file__, STAGES, f"--pause={options.pause}")
    columns = ["step", "pass", "ticks", "counted", "bubble", "measured", "bytes sent", "counted"]
    print(format_header(columns, left=2))
    rows = []
    for name, case in CASES.items():
        for phase in PHASES:
            result = compare_pass(case, phase, found[name])
            (ticks, counted), (bubble, measured), (size, sent) = result.values()
            rows.append({"case": name, "pass": phase, **result})
            shares = f"{100 * bubble:.1f} %", f"{100 * measured:.1f} %"
            print(format_row([name, phase, ticks, counted, *shares, f"{size:,}", f"{sent:,}"]))
    if options.picture:
        print(f"\n{draw_trace(found[DRAWN], CASES[DRAWN], options.picture)}")
    write_numbers(options, {"rows": rows, "trace": found[DRAWN]})


if __name__ == "__main__":
    main()
