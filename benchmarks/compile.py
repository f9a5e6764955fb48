"""Gain of compiling the layers: tokens per second against T, as written and compiled, and the number of graphs.

One process, gradient through the last k iterations or all. Every round runs every T with one kind of layers and then
with the other; medians of the rounds count. The time to compile is that of each kind's first steps less later ones.
On the CPU with one thread the clock is the CPU time of the process, which other programs hardly change.

    python benchmarks/compile.py [--loops 1 4 16] [--backprop 4] [--precision bfloat16] [--out FILE.json]
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from tools.options import make_parser, write_numbers
from tools.steps import build_small_engine, draw_tokens, take_step
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_in_turn
from torch._dynamo.utils import counters

from megatron_rdt.depth import DepthPlan

KINDS = ("none", "layers")  # of train.compile


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Return step "times" by kind and T, "first_s" by kind, and "graphs"; SystemExit if a later step compiles."""
    torch.set_num_threads(options.threads)
    sizes = {"dim": options.dim, "heads": options.dim // 64, "kv_heads": options.dim // 64}
    engines = {kind: build_small_engine(options.precision, kind, **sizes) for kind in KINDS}
    tokens = draw_tokens(options.batch, options.sequence)
    plans = {t: DepthPlan((t,) * options.batch, options.backprop or None) for t in options.loops}
    steps = {(t, k): partial(take_step, engines[k], tokens, plan) for t, plan in plans.items() for k in KINDS}
    wall = make_clock(engines["none"].device, threads=0)  # compilation runs in other processes too
    first: dict[str, float] = {}
    for kind in KINDS:
        seconds = measure_in_turn({t: steps[t, kind] for t in options.loops}, 1, wall)
        first[kind] = sum(sum(each) for each in seconds.values())
    graphs = counters["stats"]["unique_graphs"]
    times = measure_in_turn(steps, options.rounds, make_clock(engines["none"].device, options.threads))
    if counters["stats"]["unique_graphs"] != graphs:
        raise SystemExit("a later step compiled again")
    by_kind = {kind: {t: times[t, kind] for t in options.loops} for kind in KINDS}
    return {"times": by_kind, "first_s": first, "graphs": graphs}


def main() -> None:
    """Print the seconds of the first steps; per T, tokens/s as written and compiled, ratio and number of graphs."""
    parser = make_parser(__doc__, loops=[1, 2, 4, 8, 16], dim=256, batch=4, sequence=128, rounds=5, threads=1, out=None)
    parser.add_argument("--backprop", type=int, default=0, help="k; 0 means all")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    found = measure_steps(options)
    tokens = options.batch * options.sequence
    print(f"First steps: {found['first_s']['none']:.0f} s as written, {found['first_s']['layers']:.0f} s compiled.\n")
    print(format_header(["T", "as written: tokens/s", "compiled: tokens/s", "ratio", "graphs"]))
    for t in options.loops:
        plain, compiled = (found["times"][kind][t] for kind in KINDS)
        ratio = statistics.median(a / b for a, b in zip(plain, compiled))
        speeds = [f"{tokens / statistics.median(each):,.0f}" for each in (plain, compiled)]
        print(format_row([t, *speeds, f"{ratio:.2f}", found["graphs"]]))
    write_numbers(options, found)


if __name__ == "__main__":
    main()
