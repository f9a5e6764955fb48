"""Time of an evaluation at several T: one call for all of them, which runs shared iterations once, against a call for each.

The models are those of the quickstart, untrained; a batch is one micro-batch of their evaluation. Times are CPU times of
one thread, the fastest of several rounds in turn; the losses of both ways are compared bit for bit.

    python benchmarks/several_loops.py [--rounds 3] [--out FILE.json]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_in_turn

from megatron_rdt.config import load_config
from megatron_rdt.model import RecurrentDepthTransformer, initialize

CONFIGS = Path(__file__).parents[1] / "configs"
# Name -> config, sequences and tokens of a batch, values of T.
CASES: dict[str, tuple[str, tuple[int, int], list[int]]] = {
    "text": ("quickstart.yaml", (8, 256), [1, 2, 4, 8]),
    "text, more T": ("quickstart.yaml", (8, 256), [1, 2, 4, 6, 8, 12, 16]),
    "words": ("quickstart_depth.yaml", (64, 64), [1, 2, 4, 8, 12, 16, 24, 32, 64]),
}


def make_ways(file: str, shape: tuple[int, int], loops: Sequence[int]) -> dict[str, Callable[[], torch.Tensor]]:
    """Return functions that measure the losses of a batch at each T, (T's, rows), "together" or "each"."""
    config = load_config(CONFIGS / file, [])
    model = initialize(RecurrentDepthTransformer(config.model), seed=0).eval()
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)

    @torch.no_grad()
    def measure_together() -> torch.Tensor:
        return model(tokens, loops=loops, targets=targets, per_row=True)["cross_entropy"]

    @torch.no_grad()
    def measure_each() -> torch.Tensor:
        return torch.stack([model(tokens, t, targets=targets, per_row=True)["cross_entropy"] for t in loops])

    return {"together": measure_together, "each": measure_each}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the seconds of both ways by case; ValueError if their losses differ."""
    torch.set_num_threads(options.threads)
    found = {}
    for name, (file, shape, loops) in CASES.items():
        ways = make_ways(file, shape, loops)
        if not torch.equal(ways["together"](), ways["each"]()):
            raise ValueError(f"{name}: the losses differ")
        times = measure_in_turn(ways, options.rounds, make_clock(torch.device("cpu"), options.threads))
        found[name] = {way: min(seconds) for way, seconds in times.items()}
    return found


def main() -> None:
    """Measure, print a table, and write the numbers."""
    options = make_parser(__doc__, rounds=3, threads=1, out=None).parse_args()
    found = measure(options)
    print(format_header(["model", "T", "a call for each: ms", "one call: ms", "ratio"], left=2))
    for name, seconds in found.items():
        ratio = seconds["each"] / seconds["together"]
        loops = ", ".join(map(str, CASES[name][2]))
        print(
            format_row(
                [name, loops, f"{1e3 * seconds['each']:.0f}", f"{1e3 * seconds['together']:.0f}", f"{ratio:.2f}"]
            )
        )
    write_numbers(options, {"seconds": found})


if __name__ == "__main__":
    main()
