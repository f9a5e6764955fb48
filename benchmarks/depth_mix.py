"""What a batch of sequences of different T costs, against the same sequences at one T.

Three training steps on the same tokens: each sequence at its own T, drawn from the log-normal Poisson distribution such
that the mean over the batch is exactly `--mean`; all at that mean; all at the largest T of the draw, which is what a
loop that masks finished sequences executes. Every round has another draw and runs the three one after the other; the
ratios are taken within the round, and their median over the rounds is printed, with the smallest and the largest.

Times are CPU time of the process, with one thread; on a GPU the wall clock.

    python benchmarks/depth_mix.py [--rounds 7] [--sequences 16] [--length 128] [--backprop 4] [--profile] [--out FILE.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.config import DepthConfig, ModelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import MicroBatch, make_engine

VOCABULARY = 4096
CASES = ("mixed", "mean", "largest")


def make_engine_for(dim: int) -> Any:
    """A single-process engine; prelude, core and coda have two layers each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"prelude_layers": 2, "core_layers": 2, "coda_layers": 2, "heads": 4, "kv_heads": 4, "ffn_dim": 4 * dim}
    config = RunConfig(
        model=ModelConfig(vocab_size=VOCABULARY, dim=dim, **shape),
        train=TrainConfig(precision="bfloat16" if device.type == "cuda" else "float32"),
    )
    engine = make_engine(config, device)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    engine.setup(model)
    return engine


def draws(mean: int, sequences: int, count: int) -> list[tuple[int, ...]]:
    """`count` batches of T whose mean is exactly `mean`; E[T] of the distribution is its rate's mean plus 1."""
    sampler = DepthSampler(DepthConfig(mean=mean - 1, max=64, per="sequence"), seed=0)
    found: list[tuple[int, ...]] = []
    step = 0
    while len(found) < count:
        loops = sampler.draw_loops(step, range(sequences), sequences)
        found += [loops] if sum(loops) == mean * sequences else []
        step += 1
    return found


def make_step(engine: Any, tokens: torch.Tensor, plan: DepthPlan) -> Callable[[], float]:
    """One optimizer step as a function that returns its seconds."""
    clock = time.perf_counter if engine.device.type == "cuda" else time.process_time

    def step() -> float:
        began = clock()
        engine.forward_backward([MicroBatch(Batch(tokens), plan)])
        engine.clip(1.0)
        engine.step(1e-4)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    return step


def measure(engine: Any, options: argparse.Namespace, backprop: int | None) -> list[dict[str, float]]:
    """Per round: seconds of each case, and the largest T; after one round to warm up."""
    tokens = torch.randint(0, VOCABULARY, (options.sequences, options.length + 1))
    rounds = []
    for loops in draws(options.mean, options.sequences, options.rounds + 1):
        plans = {
            "mixed": DepthPlan(loops, backprop),
            "mean": DepthPlan((options.mean,) * options.sequences, backprop),
            "largest": DepthPlan((max(loops),) * options.sequences, backprop),
        }
        seconds = {name: make_step(engine, tokens, plans[name])() for name in CASES}
        rounds.append({**seconds, "T": max(loops)})
    return rounds[1:]


def row(name: str, rounds: list[dict[str, float]]) -> str:
    """One line of the table."""
    cells = []
    for case in ("mixed", "largest"):
        ratios = sorted(r[case] / r["mean"] for r in rounds)
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    seconds = statistics.median(r["mean"] for r in rounds)
    largest = statistics.median(r["T"] for r in rounds)
    return f"| {name} | {seconds:.2f} | {cells[0]} | {cells[1]} | {largest:.0f} |"


def profile(engine: Any, options: argparse.Namespace) -> None:
    """The costliest operations of a mixed step and of one at the mean."""
    tokens = torch.randint(0, VOCABULARY, (options.sequences, options.length + 1))
    (loops,) = draws(options.mean, options.sequences, 1)
    for name, plan in (("mixed", loops), ("mean", (options.mean,) * options.sequences)):
        step = make_step(engine, tokens, DepthPlan(plan))
        step()
        with torch.profiler.profile() as profiler:
            step()
        print(f"{name}, T = {plan}\n{profiler.key_averages().table('self_cpu_time_total', row_limit=18)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean", type=int, default=8, help="mean T of a batch")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--backprop", type=int, nargs="*", default=[4], help="values of k beside full backpropagation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = make_engine_for(options.dim)
    if options.profile:
        profile(engine, options)
        return
    print(f"{options.sequences} x {options.length} tokens, width {options.dim}, T of mean {options.mean}\n")
    print(f"| gradient through | s at T = {options.mean} | mixed / mean | largest / mean | median largest T |")
    print("|---|---:|---:|---:|---:|")
    cases = {}
    for k in (None, *options.backprop):
        name = "all iterations" if k is None else f"the last {k}"
        cases[name] = measure(engine, options, k)
        print(row(name, cases[name]), flush=True)
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "profile")}
        options.out.write_text(json.dumps({"options": settings, "rounds": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
