"""What compiling the layers brings: tokens per second against T, as written and compiled, and how many graphs there are.

One process, gradient through the last k iterations or all. Every round runs every T with one kind of layers and then
with the other; medians of the rounds count. The time to compile is that of each kind's first steps less later ones.
On the CPU with one thread the clock is the CPU time of the process, which other programs hardly change.

    python benchmarks/compile.py [--loops 1 4 16] [--backprop 4] [--precision bfloat16] [--out FILE.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 4096
KINDS = ("none", "layers")


def make_engine_for(kind: str, options: argparse.Namespace) -> Any:
    """A single-process engine whose layers are compiled or not."""
    import torch

    from megatron_rdt.config import ModelConfig, RunConfig, TrainConfig
    from megatron_rdt.model import RecurrentDepthTransformer
    from megatron_rdt.parallel import make_engine

    config = RunConfig(
        model=ModelConfig(vocab_size=VOCABULARY, dim=options.dim, heads=options.dim // 64, kv_heads=options.dim // 64),
        train=TrainConfig(precision=options.precision, compile=kind),  # type: ignore[arg-type]
    )
    engine = make_engine(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    engine.setup(model)
    return engine


def make_step(engine: Any, loops: int, options: argparse.Namespace) -> Callable[[], None]:
    """One optimizer step at T = `loops`."""
    import torch

    from megatron_rdt.data import Batch
    from megatron_rdt.depth import DepthPlan
    from megatron_rdt.parallel import MicroBatch

    k = None if options.backprop == 0 else options.backprop
    tokens = torch.randint(0, VOCABULARY, (options.batch, options.sequence + 1))
    batch = [MicroBatch(Batch(tokens), DepthPlan((loops,) * options.batch, k))]

    def step() -> None:
        engine.forward_backward(batch)
        engine.clip(1.0)
        engine.step(1e-4)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by kind and T, of the first steps of each kind, and the number of graphs."""
    import torch
    from torch._dynamo.utils import counters

    torch.set_num_threads(options.threads)
    alone = options.threads == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    engines = {kind: make_engine_for(kind, options) for kind in KINDS}
    steps = {kind: {t: make_step(engines[kind], t, options) for t in options.loops} for kind in KINDS}
    first: dict[str, float] = {}
    for kind in KINDS:
        began = time.perf_counter()
        for step in steps[kind].values():
            step()
        first[kind] = time.perf_counter() - began
    graphs = counters["stats"]["unique_graphs"]
    times: dict[str, dict[int, list[float]]] = {kind: {t: [] for t in options.loops} for kind in KINDS}
    for _ in range(options.rounds):
        for t in options.loops:
            for kind in KINDS:
                began = clock()
                steps[kind][t]()
                times[kind][t].append(clock() - began)
    if counters["stats"]["unique_graphs"] != graphs:
        raise SystemExit("a later step compiled again")
    return {"times": times, "first_s": first, "graphs": graphs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="values of T")
    parser.add_argument("--backprop", type=int, default=0, help="k; 0 means all")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dim", type=int, default=256, help="width of the model; 2 core layers")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    found = measure(options)
    tokens = options.batch * options.sequence
    print(f"First steps: {found['first_s']['none']:.0f} s as written, {found['first_s']['layers']:.0f} s compiled.\n")
    print("| T | as written: tokens/s | compiled: tokens/s | ratio | graphs |\n|---:|---:|---:|---:|---:|")
    for t in options.loops:
        plain, compiled = (found["times"][kind][t] for kind in KINDS)
        ratio = statistics.median(a / b for a, b in zip(plain, compiled))
        speeds = [tokens / statistics.median(each) for each in (plain, compiled)]
        print(f"| {t} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.2f} | {found['graphs']} |")
    if options.out:
        options.out.write_text(json.dumps({"options": {**vars(options), "out": None}, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
