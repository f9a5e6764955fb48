"""Cost of a batch of sequences of different T, against the same sequences at one T.

Three training steps on the same tokens: each sequence at its own T, drawn from the log-normal Poisson distribution such
that the mean over the batch is exactly `--mean`; all at that mean; all at the largest T of the draw, as a loop that masks
finished sequences executes them. Every round has another draw and runs the three one after the other; the
ratios are taken within the round, and their median over the rounds is printed, with the smallest and the largest.

Times are CPU time of the process, with one thread; on a GPU the wall clock.

    python benchmarks/depth_mix.py [--rounds 7] [--sequences 16] [--length 128] [--backprop 4] [--profile] [--out FILE.json]
"""

import argparse
import itertools
import statistics
from functools import partial

import torch
from tools.operators import profile_step
from tools.options import make_parser, write_numbers
from tools.steps import build_small_engine, draw_tokens, take_step
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_seconds

from megatron_rdt.config import DepthConfig
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.parallel import Engine

SHAPE = {"prelude_layers": 2, "core_layers": 2, "coda_layers": 2, "heads": 4, "kv_heads": 4}


def draw_batches(mean: int, sequences: int, count: int) -> list[tuple[int, ...]]:
    """Draw `count` batches of T whose mean is exactly `mean`; other draws are rejected."""
    # E[T] of the distribution is the mean of its rate plus 1.
    sampler = DepthSampler(DepthConfig(mean=mean - 1, max=64, per="sequence"), seed=0)
    drawn = (sampler.draw_loops(step, range(sequences), sequences) for step in itertools.count())
    return list(itertools.islice((loops for loops in drawn if sum(loops) == mean * sequences), count))


def measure_rounds(engine: Engine, options: argparse.Namespace, backprop: int | None) -> list[dict[str, float]]:
    """Return per round, after a warm-up, seconds of "mixed", "mean" and "largest", and the largest T as "T"."""
    tokens = draw_tokens(options.sequences, options.length)
    clock = make_clock(engine.device, options.threads)
    rounds = []
    for loops in draw_batches(options.mean, options.sequences, options.rounds + 1):
        plans = {
            "mixed": DepthPlan(loops, backprop),
            "mean": DepthPlan((options.mean,) * options.sequences, backprop),
            "largest": DepthPlan((max(loops),) * options.sequences, backprop),
        }
        steps = {name: partial(take_step, engine, tokens, plan) for name, plan in plans.items()}
        seconds = {name: measure_seconds(step, clock) for name, step in steps.items()}
        rounds.append({**seconds, "T": max(loops)})
    return rounds[1:]


def format_ratios(name: str, rounds: list[dict[str, float]]) -> str:
    """Format a row: median seconds at the mean T, mixed / mean and largest / mean with their ranges, largest T."""
    cells = []
    for case in ("mixed", "largest"):
        ratios = sorted(r[case] / r["mean"] for r in rounds)
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    seconds = statistics.median(r["mean"] for r in rounds)
    largest = statistics.median(r["T"] for r in rounds)
    return format_row([name, f"{seconds:.2f}", *cells, f"{largest:.0f}"])


def print_profile(engine: Engine, options: argparse.Namespace) -> None:
    """Print the costliest operators of a mixed step and of one at the mean."""
    tokens = draw_tokens(options.sequences, options.length)
    (loops,) = draw_batches(options.mean, options.sequences, 1)
    for name, plan in (("mixed", loops), ("mean", (options.mean,) * options.sequences)):
        step = partial(take_step, engine, tokens, DepthPlan(plan))
        step()
        _, operators = profile_step(step)
        print(f"{name}, T = {plan}\n{operators}")


def main() -> None:
    """Print one line for full backpropagation and one for every k."""
    parser = make_parser(__doc__, dim=256, rounds=7, threads=1, out=None)
    parser.add_argument("--mean", type=int, default=8, help="mean T of a batch")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--backprop", type=int, nargs="*", default=[4], help="values of k, besides all iterations")
    parser.add_argument("--profile", action="store_true", help="print the costliest operators instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = build_small_engine(dim=options.dim, ffn_dim=4 * options.dim, **SHAPE)
    if options.profile:
        print_profile(engine, options)
        return
    print(f"{options.sequences} x {options.length} tokens, width {options.dim}, T of mean {options.mean}\n")
    columns = [f"s at T = {options.mean}", "mixed / mean", "largest / mean", "median largest T"]
    print(format_header(["gradient through", *columns], left=1))
    cases = {}
    for k in (None, *options.backprop):
        name = "all iterations" if k is None else f"the last {k}"
        cases[name] = measure_rounds(engine, options, k)
        print(format_ratios(name, cases[name]), flush=True)
    write_numbers(options, {"rounds": cases})


if __name__ == "__main__":
    main()
