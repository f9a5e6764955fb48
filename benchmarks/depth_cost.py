"""What a loop costs: time and peak memory of an optimizer step against T.

Three ways to train: gradient through all iterations, the same with one checkpoint per iteration, and gradient
through the last k only; `--modes` also takes the other policies of `depth.checkpoint`. Beside each time stands the
ideal: the step's fixed cost plus its iterations, which are timed one by one outside the loop.

Times are the fastest of several rounds over all cases. On the CPU with one thread the clock is the CPU time of the
process, which other programs hardly change; otherwise it is the wall clock. Peak memory is measured in a fresh process
per case; on the CPU the C library is told to give freed blocks back, so that its cache is not counted.

    python benchmarks/depth_cost.py [--loops 1 2 4] [--modes full every-4] [--rounds 4] [--out FILE.json]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

K = 4
VOCABULARY = 4096
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
# glibc: blocks of 128 KiB and more are mapped, hence returned when freed.
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def make_engine_for(options: argparse.Namespace) -> Any:
    """A single-process engine with the model that the options describe."""
    import torch

    from megatron_rdt.config import ModelConfig, RunConfig, TrainConfig
    from megatron_rdt.model import RecurrentDepthTransformer
    from megatron_rdt.parallel import make_engine

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = RunConfig(
        model=ModelConfig(vocab_size=VOCABULARY, dim=options.dim, ffn_dim=2 * options.dim),
        train=TrainConfig(precision="bfloat16" if device.type == "cuda" else "float32"),
    )
    engine = make_engine(config, device)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    engine.setup(model)
    return engine


def make_step(engine: Any, options: argparse.Namespace, mode: str, loops: int) -> Callable[[], None]:
    """One optimizer step of a case, as a function."""
    import torch

    from megatron_rdt.data import Batch
    from megatron_rdt.depth import DepthPlan
    from megatron_rdt.model.activation_checkpointing import set_checkpointing
    from megatron_rdt.parallel import MicroBatch

    k, checkpointing = MODES[mode]
    tokens = torch.randint(0, VOCABULARY, (options.batch, options.sequence + 1))
    batch = [MicroBatch(Batch(tokens), DepthPlan((loops,) * options.batch, k))]

    def step() -> None:
        set_checkpointing(engine.model, checkpointing)
        engine.forward_backward(batch)
        engine.clip(1.0)
        engine.step(1e-4)

    return step


def make_pieces(engine: Any, options: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None]]:
    """One iteration of the core by itself: forward without gradient, and forward plus backward."""
    import torch

    from megatron_rdt.model.attention.rope import rotary_tables
    from megatron_rdt.model.forward_context import LayerContext, LoopInputs

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

    return forward, both


def measure_times(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of every case ("full 8") and of the pieces, the fastest of `rounds` after one round to warm up."""
    import torch

    engine = make_engine_for(options)
    forward, both = make_pieces(engine, options)
    work = {"forward": forward, "both": both}
    work |= {f"{mode} {t}": make_step(engine, options, mode, t) for mode in options.modes for t in options.loops}
    work["full 1"] = make_step(engine, options, "full", 1)
    alone = engine.device.type == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds + 1):
        for name, function in work.items():
            for _ in range(10 if name in ("forward", "both") else 1):
                began = clock()
                function()
                if engine.device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(clock() - began)
    return {name: min(values[1:]) for name, values in times.items()}


def measure_memory(options: argparse.Namespace, mode: str, loops: int) -> float:
    """Peak memory in GB of a process that takes two steps, the second with optimizer state."""
    from megatron_rdt.train.hardware import peak_memory_gb

    engine = make_engine_for(options)
    step = make_step(engine, options, mode, loops)
    step()
    step()
    return peak_memory_gb(engine.device)


def in_fresh_process(options: argparse.Namespace, *case: str) -> Any:
    """Run one part of this script by itself and return what it measured."""
    words = [f"--{name}={getattr(options, name)}" for name in SHAPE]
    words += ["--loops", *map(str, options.loops), "--modes", *options.modes, "--case", *case]
    environment = os.environ | (RETURN_FREED_BLOCKS if case[0] != "times" else {})
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(case)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def ideal(mode: str, loops: int, times: dict[str, float]) -> float:
    """Seconds of a step whose loop costs nothing but its iterations; `selective` computes less than that again."""
    fixed = times["full 1"] - times["both"]
    if mode == "full":
        return fixed + loops * times["both"]
    if MODES[mode][0] is None:
        return fixed + loops * (times["forward"] + times["both"])
    with_grad = min(loops, K)
    return fixed + (loops - with_grad) * times["forward"] + with_grad * times["both"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per T; step time, ideal time and peak memory of each mode."""
    modes = dict.fromkeys(row["mode"] for row in rows)
    header = ["T", *(f"{mode}: {column}" for mode in modes for column in ("ms", "ideal ms", "peak GB"))]
    lines = [f"| {' | '.join(header)} |", f"|{'---:|' * len(header)}"]
    for loops in dict.fromkeys(row["loops"] for row in rows):
        cells = [
            f"{1e3 * row['seconds']:.0f} | {1e3 * row['ideal']:.0f} | {row['peak_gb']:.3f}"
            for row in rows
            if row["loops"] == loops
        ]
        lines.append(f"| {loops} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="values of T")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=DEFAULT_MODES, help="ways to train")
    parser.add_argument("--dim", type=int, default=256, help="width of the model; 2 core layers")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=4, help="the fastest of these counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--case", nargs="+", help="measure one part and print it as JSON: times, or MODE T")
    options = parser.parse_args()
    options.loops = sorted({1, *options.loops})
    if options.case:
        part = options.case
        print(
            json.dumps(measure_times(options) if part == ["times"] else measure_memory(options, part[0], int(part[1])))
        )
        return
    times = in_fresh_process(options, "times")
    cases = [(mode, loops) for loops in options.loops for mode in options.modes]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # memory does not mind company
        peaks = pool.map(lambda case: in_fresh_process(options, case[0], str(case[1])), cases)
        rows = [
            {"mode": m, "loops": t, "seconds": times[f"{m} {t}"], "ideal": ideal(m, t, times), "peak_gb": peak}
            for (m, t), peak in zip(cases, peaks)
        ]
    print(
        f"One optimizer step, {options.batch} x {options.sequence} tokens, width {options.dim}, 2 core layers. One "
        f"iteration: {1e3 * times['forward']:.1f} ms forward, {1e3 * times['both']:.1f} ms forward and backward; "
        f"fixed cost of a step: {1e3 * (times['full 1'] - times['both']):.0f} ms.\n\n{table(rows)}"
    )
    if options.out:
        numbers = {"options": {name: getattr(options, name) for name in SHAPE}, "times": times, "cases": rows}
        options.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
