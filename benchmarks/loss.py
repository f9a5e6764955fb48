"""Chunked cross entropy against torch's on full logits: time and peak memory of forward and backward.

Time is the fastest of several rounds, the two ways interleaved; on the CPU it is the CPU time of the process with one
thread. Peak memory is the growth of a fresh process, in which freed blocks are returned to the system.

    python benchmarks/loss.py [--vocabularies 4096 32768] [--tokens 2048] [--dim 256] [--rounds 3]
"""

import argparse
from functools import partial
from typing import Any

import torch
from tools.options import make_parser, repeat_options
from tools.processes import run_fresh
from tools.resident_memory import measure_growth
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_in_turn, pick_device
from torch.nn import functional

from megatron_rdt.model.cross_entropy import cross_entropy

WAYS = ("chunked", "full logits")


def make_loss(way: str, dtype: torch.dtype, tokens: int, dim: int, vocabulary: int) -> Any:
    """Return a function that runs the summed loss of random data forward and backward and returns it as a float."""
    device = pick_device()
    features = torch.randn(tokens, dim, device=device).to(dtype).requires_grad_()
    matrix = (0.02 * torch.randn(vocabulary, dim, device=device)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def run() -> float:
        features.grad = matrix.grad = None
        if way == "chunked":
            value = cross_entropy(features, matrix, targets)[0]
        else:
            logits = functional.linear(features, matrix.to(dtype)).float()
            value = functional.cross_entropy(logits, targets, reduction="sum")
        value.backward()
        return float(value.detach())

    return run


def measure_peak(options: argparse.Namespace, way: str, vocabulary: int) -> float:
    """Bytes by which one forward and backward pass raises this process's peak memory."""
    make = partial(make_loss, way, getattr(torch, options.dtype))
    run = make(options.tokens, options.dim, vocabulary)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    make(8, 8, 8)()  # so that what a library allocates at its first use is not counted
    return measure_growth(run)


def main() -> None:
    """Print one line per size of the vocabulary; with --only, measure the memory of one way and print it."""
    parser = make_parser(__doc__, dim=256, rounds=3)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768], help="sizes of the vocabulary")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(measure_peak(options, options.only, options.vocabularies[0]))
        return
    words, clock = repeat_options(options, ("tokens", "dim", "dtype")), make_clock(pick_device(), 1)
    columns = [*(f"{way}: ms" for way in WAYS), *(f"{way}: peak MB" for way in WAYS)]
    print(format_header(["vocabulary", *columns]))
    for vocabulary in options.vocabularies:
        sizes = options.tokens, options.dim, vocabulary
        runs = {way: make_loss(way, getattr(torch, options.dtype), *sizes) for way in WAYS}
        times = measure_in_turn(runs, options.rounds, clock, warm_up=1)
        fastest = [1000 * min(times[way]) for way in WAYS]
        alone = [*words, "--vocabularies", str(vocabulary)]
        peaks = [run_fresh(__file__, *alone, "--only", way, return_freed_blocks=True) / 1e6 for way in WAYS]
        print(format_row([f"{vocabulary:,}", *(f"{value:,.0f}" for value in (*fastest, *peaks))]), flush=True)


if __name__ == "__main__":
    main()
