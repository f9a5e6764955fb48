"""Chunked cross entropy against torch's on full logits: time and peak memory of forward and backward.

Time is the fastest of several rounds, the two ways interleaved; on the CPU it is the CPU time of the process with one
thread. Peak memory is what a fresh process needs above what it held before, with freed blocks given back to the system.

    python benchmarks/loss.py [--vocabularies 4096 32768] [--tokens 2048] [--dim 256] [--rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from megatron_rdt.model.cross_entropy import cross_entropy

WAYS = ("chunked", "full logits")


def step(way: str, dtype: torch.dtype, tokens: int, dim: int, vocabulary: int) -> Any:
    """A function that runs the loss forward and backward once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
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


def peak_mb(way: str, options: argparse.Namespace, vocabulary: int) -> float:
    """Memory above the start, in a process of its own."""
    words = [sys.executable, __file__, "--only", way, "--vocabularies", str(vocabulary)]
    words += ["--tokens", str(options.tokens), "--dim", str(options.dim), "--dtype", options.dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    return float(json.loads(subprocess.run(words, env=environment, capture_output=True, check=True).stdout))


def measure_alone(options: argparse.Namespace) -> float:
    """What one step adds to this process's peak, in MB."""
    run = step(options.only, getattr(torch, options.dtype), options.tokens, options.dim, options.vocabularies[0])
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    step(options.only, getattr(torch, options.dtype), 8, 8, 8)()  # what the first use of the library takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_mb("VmRSS")
    run()
    return status_mb("VmHWM") - before


def status_mb(name: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(measure_alone(options))
        return
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    print(
        "| vocabulary | chunked: ms | full logits: ms | chunked: peak MB | full logits: peak MB |\n|---:|---:|---:|---:|---:|"
    )
    for vocabulary in options.vocabularies:
        runs = {way: step(way, getattr(torch, options.dtype), options.tokens, options.dim, vocabulary) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.rounds + 1):
            for way, run in runs.items():
                began = clock()
                run()
                times[way].append(clock() - began)
        fastest = [1000 * min(times[way][1:]) for way in WAYS]
        peaks = [peak_mb(way, options, vocabulary) for way in WAYS]
        print(f"| {vocabulary:,} | {' | '.join(f'{value:,.0f}' for value in (*fastest, *peaks))} |", flush=True)


if __name__ == "__main__":
    main()
