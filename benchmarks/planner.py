"""Error of the memory that `rdt plan` predicts, against the memory that steps allocate.

A grid of small models on the CPU, in one process and under FSDP2 on two: feed-forward dense or a mixture of experts,
attention gqa or mla, products in float32 or bfloat16, everything kept, per-iteration checkpoints, or gradient through the
last 2 iterations with two micro-batches. The prediction is compared with the peak of allocated bytes during a step; for a
few cases also with the growth of resident memory in a process of its own, which includes memory that the C library and
gloo keep.

    python benchmarks/planner.py [--loops 1 4 16] [--out FILE.json]
    python benchmarks/planner.py --presets      # writes the last table of RESULTS.md
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tools.options import make_parser, repeat_options, write_numbers
from tools.processes import ROOT, run_fresh, run_ranks
from tools.resident_memory import measure_growth
from tools.tables import format_header, format_row

from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.environment import leave_process, quiet_libraries

SEQUENCE, BATCH = 128, 2
MODEL = ModelConfig(dim=256, ffn_dim=512)
ATTENTION: dict[str, dict[str, Any]] = {"gqa": {}, "mla": {"attention": "mla", "query_rank": 64}}
FEEDFORWARD: dict[str, dict[str, Any]] = {"dense": {}, "moe": {"core_ffn": "moe"}}
# name -> checkpointing, k, micro-batches per step
MODES: dict[str, tuple[str, Any, int]] = {
    "all kept": ("none", "all", 1),
    "per_iteration": ("per_iteration", "all", 1),
    "last 2, 2 micro-batches": ("none", 2, 2),
}
RESIDENT_LOOPS = 4
RESIDENT = ("gqa dense float32 all kept", "gqa moe float32 all kept", "mla dense bfloat16 per_iteration")
DEVICE_COUNTS = (8, 64, 512, 4096, 16384)


def make_cases(processes: int) -> dict[str, RunConfig]:
    """Make the configs of the grid, by name ("gqa dense float32 all kept"), for one process or FSDP on several."""
    found = {}
    for attention, ffn, precision, mode in product(ATTENTION, FEEDFORWARD, ("float32", "bfloat16"), MODES):
        checkpoint, k, number = MODES[mode]
        batch = BATCH if precision == "float32" else 2 * BATCH
        sizes = {"micro_batch": batch, "global_batch": batch * number * processes, "sequence_length": SEQUENCE}
        found[f"{attention} {ffn} {precision} {mode}"] = RunConfig(
            model=replace(MODEL, **ATTENTION[attention], **FEEDFORWARD[ffn]),
            depth=DepthConfig(checkpoint=checkpoint, backprop=k),
            train=TrainConfig(**sizes, precision=precision, device="cpu"),
            parallel=ParallelConfig(engine="single" if processes == 1 else "fsdp"),
        )
    return found


def predict_peak(config: RunConfig, processes: int, loops: int) -> float:
    """Peak bytes of a step at T = `loops` that the planner predicts."""
    from megatron_rdt.planner.memory import StepDepth, step_memory

    k = loops if config.depth.backprop == "all" else int(config.depth.backprop)
    return step_memory(config, Layout.of(config.parallel, processes), False, StepDepth(loops, min(k, loops))).peak


def run_worker(options: argparse.Namespace) -> None:
    """Measure every case and T as one of the processes; rank 0 writes measured and planned bytes to --worker."""
    import torch

    from megatron_rdt.environment import read_process_info
    from megatron_rdt.parallel.process_group import join_process_group
    from megatron_rdt.planner.measure import measure_steps

    process, rows = read_process_info(), []
    torch.manual_seed(process.rank)
    cases = make_cases(process.world_size)
    device = join_process_group(next(iter(cases.values())), process)
    for name, config in cases.items():
        for each in measure_steps(config, device, options.loops):
            plan = predict_peak(config, process.world_size, each.loops)
            rows.append({"case": name, "loops": each.loops, "measured": each.peak, "planned": plan})
    if process.rank == 0:
        options.worker.write_text(json.dumps(rows))


def measure_resident(name: str) -> int:
    """Return the bytes by which a case's engine and two steps raise this process's resident memory at its peak."""
    import torch

    from megatron_rdt.parallel import build_engine
    from megatron_rdt.planner.measure import take_step

    config, cpu = make_cases(1)[name], torch.device("cpu")
    # A small model first, so that what libraries allocate at their first use is not counted.
    small = replace(config.model, dim=16, heads=2, vocab_size=32)
    take_step(build_engine(replace(config, model=small, depth=DepthConfig(mean=1, max=1)), cpu), 1)

    def train() -> None:
        engine = build_engine(config, cpu)
        for _ in range(2):
            take_step(engine, RESIDENT_LOOPS)

    return measure_growth(train)


def format_table(rows: list[dict[str, Any]], loops: list[int]) -> str:
    """Markdown: a line per case; measured megabytes and the planner's error at each T."""
    lines = [format_header(["case", *(f"T = {t}: {column}" for t in loops for column in ("MB", "error"))], left=1)]
    for case in dict.fromkeys(row["case"] for row in rows):
        pairs = [(row["measured"], row["planned"]) for row in rows if row["case"] == case]
        lines.append(format_row([case, *(f"{m / 1e6:.1f} | {100 * (p / m - 1):+.1f} %" for m, p in pairs)]))
    return "\n".join(lines)


def measure_grid(options: argparse.Namespace) -> None:
    """Measure the grid and the resident memory of some cases; print the tables, write the numbers to --out."""
    found: dict[str, Any] = {}
    for processes in (1, 2):
        rows = found[str(processes)] = run_ranks(__file__, processes, *repeat_options(options, ("loops",)))
        errors = [abs(row["planned"] / row["measured"] - 1) for row in rows]
        engine = "one process" if processes == 1 else "fsdp on 2 processes"
        summary = f"error at most {100 * max(errors):.1f} %, median {100 * median(errors):.1f} %, {len(rows)} steps"
        print(f"{engine}: {summary}\n\n{format_table(rows, options.loops)}\n")
    print(format_header([f"case, T = {RESIDENT_LOOPS}", "planned MB", "resident MB", "error"], left=1))
    for name in RESIDENT:
        size = run_fresh(__file__, "--resident", name, return_freed_blocks=True)
        plan = predict_peak(make_cases(1)[name], 1, RESIDENT_LOOPS)
        found.setdefault("resident", {})[name] = {"resident": size, "planned": plan}
        print(format_row([name, f"{plan / 1e6:.1f}", f"{size / 1e6:.1f}", f"{100 * (plan / size - 1):+.1f} %"]))
    write_numbers(options, found)


# Texts and numbers alternate, so the alignment is written out.
PRESET_COLUMNS = (
    "preset, tokens per sequence | H100 | step, tokens | replicate x shard x context x tensor, expert | micro-batch | "
    "checkpoint, core_gather, reduce | GB | step, s | MFU"
)
PRESET_HEADER = f"| {PRESET_COLUMNS} |\n|---|---:|---:|---|---:|---|---:|---:|---:|"


def format_preset(path: Path) -> str:
    """Plan one preset; return a Markdown row per number of devices."""
    from tools.preset_plans import plan_preset, step_tokens

    lines, name = [], f"{path.stem}, {load_config(path).train.sequence_length:,}"
    for devices in DEVICE_COUNTS:
        plan = plan_preset(path, devices)
        begin, name = f"| {name} | {devices:,} | {step_tokens(devices) / 2**20:.0f}M |", ""
        if plan is None or plan.time is None:
            lines.append(f"{begin} nothing fits | | | | | |")
            continue
        layout, run, time = plan.layout, plan.config, plan.time
        axes = f"{layout.replicate} x {layout.shard} x {layout.context} x {layout.tensor}, {layout.expert}"
        compiled = ", compiled" if run.train.compile == "layers" else ""
        ways = f"{run.depth.checkpoint}, {run.parallel.core_gather}, {run.parallel.reduce}{compiled}"
        lines.append(
            f"{begin} {axes} | {run.train.micro_batch} | {ways} "
            f"| {plan.memory.peak / 1e9:.1f} | {time.expected:.3g} | {100 * time.mfu:.0f} % |"
        )
    return "\n".join(lines)


def write_preset_table() -> None:
    """Plan every preset, print its rows, and replace all after the mark in benchmarks/RESULTS.md by the table."""
    page = ROOT / "benchmarks" / "RESULTS.md"
    text, mark = page.read_text(encoding="utf-8"), "<!-- made by benchmarks/planner.py --presets -->"
    rows = [PRESET_HEADER]
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml")):
        rows.append(format_preset(path))
        print(rows[-1], flush=True)
    page.write_text(text[: text.index(mark) + len(mark)] + "\n\n" + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the grid, or do the part that an option names."""
    parser = make_parser(__doc__, loops=[1, 4, 16], out=None)
    parser.add_argument("--presets", action="store_true", help="write the last table of benchmarks/RESULTS.md instead")
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    parser.add_argument("--resident", metavar="CASE", help="print the growth of resident memory of one case")
    options = parser.parse_args()
    quiet_libraries(1)
    if options.worker:
        run_worker(options)
        leave_process(0)
    elif options.resident:
        print(json.dumps(measure_resident(options.resident)))
    elif options.presets:
        write_preset_table()
    else:
        measure_grid(options)


if __name__ == "__main__":
    main()
