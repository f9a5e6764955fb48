"""Share of the time in which ranks compute while all wait for the deepest, for each `depth.per` that draws T in a step.

The mean over ranks of a step's iterations, forward and backward, over the largest, averaged over steps; prelude, coda and
loss count as 12 iterations. T and k are those of a preset, one sequence per micro-batch. Nothing is timed.

    python benchmarks/depth_balance.py [--preset huginn_3_5b] [--ranks 8 512] [--out FILE.json]
"""

import argparse

import numpy as np
from tools.options import MODELS, PRESETS, make_parser, write_numbers
from tools.tables import format_header, format_row

from megatron_rdt.config import load_config
from megatron_rdt.depth import DepthSampler

CHOICES = ("micro_batch", "sequence", "accumulation_step")
MICRO_BATCHES = (1, 2, 4, 8, 16)
OUTSIDE, STEPS = 12, 20


def measure_balance(preset: str, per: str, ranks: int, micro_batches: int) -> float:
    """Mean over the largest of the ranks' work, averaged over steps."""
    config = load_config(MODELS / f"{preset}.yaml", [f"depth.per={per}"])
    sampler, shares = DepthSampler(config.depth, config.run.seed), []
    for step in range(STEPS):
        drawn = np.array(sampler.draw_loops(step, range(ranks * micro_batches), 1, micro_batches))
        backprop = drawn if config.depth.backprop == "all" else np.minimum(drawn, int(config.depth.backprop))
        work = (drawn + 2 * backprop + OUTSIDE).reshape(ranks, micro_batches).sum(1)
        shares.append(work.mean() / work.max())
    return float(np.mean(shares))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, out=None)
    parser.add_argument("--preset", choices=PRESETS, default="huginn_3_5b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 512])
    return parser.parse_args()


def main() -> None:
    """Print a row per number of ranks and choice, a column per number of micro-batches of each rank."""
    options = parse_options()
    print(format_header(["ranks", "depth.per", *(f"{number} micro-batches" for number in MICRO_BATCHES)], left=2))
    found = []
    for ranks in options.ranks:
        for per in CHOICES:
            shares = [measure_balance(options.preset, per, ranks, number) for number in MICRO_BATCHES]
            found.append({"ranks": ranks, "per": per, "shares": dict(zip(MICRO_BATCHES, shares))})
            print(format_row([ranks, per, *(f"{share:.2f}" for share in shares)]))
    write_numbers(options, {"rows": found})


if __name__ == "__main__":
    main()
