"""Cost of a loop: time and peak memory of an optimizer step against T.

Three ways to train: gradient through all iterations, the same with one checkpoint per iteration, and gradient
through the last k only; `--modes` also takes the other policies of `depth.checkpoint`. Next to each time is the
ideal: the step's fixed cost plus its iterations, which are timed one by one outside the loop.

Times are the fastest of several rounds over all cases. On the CPU with one thread the clock is the CPU time of the
process, which other programs hardly change; otherwise it is the wall clock. Peak memory is measured in a fresh process
per case; on the CPU the C library returns freed blocks to the system, so that its cache is not counted.

    python benchmarks/depth_cost.py [--loops 1 2 4] [--modes full every-4] [--rounds 4] [--out FILE.json]
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tools.options import make_parser, repeat_options, write_numbers
from tools.processes import run_fresh
from tools.steps import build_small_engine, draw_tokens, take_step
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_in_turn

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.parallel import Engine
from megatron_rdt.train.hardware import peak_memory_gb

K = 4
# name -> (k, checkpointing)
MODES: dict[str, tuple[int | None, int | str]] = {
    "full": (None, "none"),
    "checkpointed": (None, "per_iteration"),
    f"last {K}": (K, "none"),
    "every-4": (None, 4),
    "per-layer": (None, "per_layer"),
    "selective": (None, "selective"),
}
DEFAULT_MODES = ("full", "checkpointed", f"last {K}")
SHAPE = ("dim", "batch", "sequence", "rounds", "threads")
PIECE_CALLS = 10  # per round: one iteration is much shorter than a step


def build_depth_engine(options: argparse.Namespace) -> Engine:
    """Set the number of CPU threads and build a single-process engine with the model that the options describe."""
    torch.set_num_threads(options.threads)
    return build_small_engine(dim=options.dim, ffn_dim=2 * options.dim)


def make_step(engine: Engine, options: argparse.Namespace, mode: str, loops: int) -> Callable[[], None]:
    """Return a function that sets the mode's checkpointing and takes one optimizer step at T = `loops`."""
    k, checkpointing = MODES[mode]
    tokens = draw_tokens(options.batch, options.sequence)
    plan = DepthPlan((loops,) * options.batch, k)

    def step() -> None:
        set_checkpointing(engine.model, checkpointing)
        take_step(engine, tokens, plan)

    return step


def make_pieces(engine: Engine, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Functions that run one iteration of the core: "forward" without gradient, "both" with a backward pass."""
    config, device = engine.model.config, engine.device
    dtype = engine.model.compute_dtype or torch.float32
    positions = torch.arange(options.sequence, device=device)
    rotary = rotary_tables(positions, config.dim // config.heads, config.rope_base, dtype)
    tokens = torch.zeros(options.batch, options.sequence, dtype=torch.int64, device=device)
    context = LayerContext(rotary, None, dtype, tokens)
    shape = (options.batch, options.sequence, options.dim)
    state, encoded = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))

    t = torch.zeros(options.batch, dtype=torch.int64, device=device)
    inputs = LoopInputs(encoded, context, t + 1, [None] * config.core_layers)

    def forward() -> None:
        with torch.no_grad():
            engine.model.core.iterate(state, t, inputs)

    def both() -> None:
        engine.model.core.iterate(state, t, inputs).backward(torch.ones(shape, device=device))

    return {"forward": forward, "both": both}


def measure_times(options: argparse.Namespace) -> dict[str, float]:
    """Return seconds by case ("full 8") and piece ("forward", "both"), the fastest of `rounds` after a warm-up."""
    engine = build_depth_engine(options)
    cases = make_pieces(engine, options)
    calls = dict.fromkeys(cases, PIECE_CALLS)
    cases |= {f"{mode} {t}": make_step(engine, options, mode, t) for mode in options.modes for t in options.loops}
    cases["full 1"] = make_step(engine, options, "full", 1)
    clock = make_clock(engine.device, options.threads)
    times = measure_in_turn(cases, options.rounds, clock, warm_up=1, calls=calls)
    return {name: min(seconds) for name, seconds in times.items()}


def measure_memory(options: argparse.Namespace, mode: str, loops: int) -> float:
    """Take two steps in this process, the second with optimizer state; return its peak memory in GB."""
    engine = build_depth_engine(options)
    step = make_step(engine, options, mode, loops)
    for _ in range(2):
        step()
    return peak_memory_gb(engine.device)


def measure_in_fresh_process(options: argparse.Namespace, *case: str) -> Any:
    """Run this script with --case in a fresh process: "times" returns all seconds, MODE and T the peak GB."""
    words = repeat_options(options, (*SHAPE, "loops", "modes"))
    return run_fresh(__file__, *words, "--case", *case, return_freed_blocks=case[0] != "times")


def ideal_seconds(mode: str, loops: int, times: dict[str, float]) -> float:
    """Seconds of a step whose loop costs nothing but its iterations; `selective` recomputes less than is counted here."""
    fixed = times["full 1"] - times["both"]
    if mode == "full":
        return fixed + loops * times["both"]
    if MODES[mode][0] is None:  # checkpointed: every iteration is computed again in the backward pass
        return fixed + loops * (times["forward"] + times["both"])
    with_grad = min(loops, K)
    return fixed + (loops - with_grad) * times["forward"] + with_grad * times["both"]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per T; step time, ideal time and peak memory of each mode."""
    modes = dict.fromkeys(row["mode"] for row in rows)
    lines = [format_header(["T", *(f"{mode}: {column}" for mode in modes for column in ("ms", "ideal ms", "peak GB"))])]
    for loops in dict.fromkeys(row["loops"] for row in rows):
        same = [row for row in rows if row["loops"] == loops]
        cells = [f"{1e3 * r['seconds']:.0f} | {1e3 * r['ideal']:.0f} | {r['peak_gb']:.3f}" for r in same]
        lines.append(format_row([loops, *cells]))
    return "\n".join(lines)


def main() -> None:
    """Measure every case and print the table; with --case, measure one part and print it as JSON."""
    sizes = {"dim": 256, "batch": 2, "sequence": 128}
    parser = make_parser(__doc__, loops=[1, 2, 4, 8, 16, 32], **sizes, rounds=4, threads=1, out=None)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=DEFAULT_MODES, help="ways to train")
    parser.add_argument("--case", nargs="+", help="measure one part and print it as JSON: times, or MODE T")
    options = parser.parse_args()
    options.loops = sorted({1, *options.loops})
    if options.case:
        part = options.case
        found = measure_times(options) if part == ["times"] else measure_memory(options, part[0], int(part[1]))
        print(json.dumps(found))
        return
    times = measure_in_fresh_process(options, "times")
    cases = [(mode, loops) for loops in options.loops for mode in options.modes]
    # Other processes do not change peak memory, so these run at the same time; times were measured alone.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        peaks = pool.map(lambda case: measure_in_fresh_process(options, case[0], str(case[1])), cases)
        rows = [
            {"mode": m, "loops": t, "seconds": times[f"{m} {t}"], "ideal": ideal_seconds(m, t, times), "peak_gb": peak}
            for (m, t), peak in zip(cases, peaks)
        ]
    print(
        f"One optimizer step, {options.batch} x {options.sequence} tokens, width {options.dim}, 2 core layers. One "
        f"iteration: {1e3 * times['forward']:.1f} ms forward, {1e3 * times['both']:.1f} ms forward and backward; "
        f"fixed cost of a step: {1e3 * (times['full 1'] - times['both']):.0f} ms.\n\n{format_table(rows)}"
    )
    write_numbers(options, {"times": times, "cases": rows})


if __name__ == "__main__":
    main()
