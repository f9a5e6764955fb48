"""Model FLOPs utilisation of a training step: the share of the chip's peak that its FLOPs reach, and the bounds on it.

A preset of about 1B parameters trains in bfloat16 (float32 weights, gradients and moments), its layers compiled
(`--no-compile`: not), with T drawn by the preset's depth, whose mean is 8 in the default one. For each length:

- step time, the median over steps; tokens/s; MFU against the chip's dense bfloat16 peak (on a CPU: against the rate of matrix
  products that is measured first). FLOPs are of the T that ran, without recomputation (megatron_rdt/model/flops.py);
- the floor of the FLOPs: their time at the peak, and at the measured rate of products of the model's shapes;
- the floor of the memory traffic: the bytes that products read and write (each factor and result once), clipping's and
  AdamW's, at the measured bandwidth of a copy. Norms, rotations and gates are not counted: fused, they add nothing;
- the share of the time by kind of operator, from a profile of one step.

    python benchmarks/mfu.py                                     # on a GPU
    python benchmarks/mfu.py --sequence 64 --batch 2 --steps 2 --set model.dim=128 model.ffn_dim=512 model.heads=4 \\
        model.kv_heads=4 model.prelude_layers=1 model.core_layers=2 model.coda_layers=1 model.vocab_size=1024
"""

import argparse
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tools.operators import format_shares, profile_step
from tools.options import make_parser, write_numbers
from tools.rates import Shape, count_products, count_training_flops, measure_product_rate
from tools.steps import take_step
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_seconds, pick_device

from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.parallel import Engine, build_engine
from megatron_rdt.train.hardware import peak_flops, peak_memory_gb

PRESET = Path(__file__).resolve().parent.parent / "configs" / "models" / "parcae_1_3b.yaml"
# float32: the norm reads the gradients; AdamW reads weight, gradient and two moments and writes all but the gradient.
OPTIMIZER_BYTES = 4 + 7 * 4
COPY_BYTES = 1 << 28


def load_preset(options: argparse.Namespace, length: int) -> RunConfig:
    """Load --preset with this length, --precision, AdamW, --compile and the keys of --set; return the config."""
    fixed = [f"train.sequence_length={length}", f"train.precision={options.precision}", "optimizer.name=adamw"]
    compiled = "layers" if options.compile else "none"
    return load_config(options.preset, [*fixed, *options.set, f"train.compile={compiled}"])


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = make_clock(device, threads=0)
    times = [measure_seconds(lambda: target.copy_(source), clock) for _ in range(6)]
    return 2 * COPY_BYTES / min(times[1:])


def count_traffic(shapes: Counter[Shape], forwards: float, backwards: float, width: int) -> float:
    """Bytes that products of these shapes move; the gradient of a weight is float32.

    Args:
        shapes: from `count_products`.
        forwards, backwards: passes through each matrix.
        width: bytes of a number in the compute dtype.
    """
    total = 0.0
    for (rows, inputs, outputs), count in shapes.items():
        x, weight, y = rows * inputs, inputs * outputs, rows * outputs
        total += count * forwards * width * (x + weight + y)
        total += count * backwards * (width * (2 * y + 2 * x + weight) + 4 * weight)
    return total


def count_step_bytes(engine: Engine, plan: DepthPlan, length: int, width: int) -> float:
    """Least number of bytes that a step moves to and from memory."""
    sequences = len(plan.iterations)
    everything = count_products(engine.model, sequences * length)
    core = count_products(engine.model.core, sequences * length)
    forwards = statistics.mean(plan.iterations)
    backwards = statistics.mean(min(t, plan.backprop or t) for t in plan.iterations)
    parameters = sum(p.numel() for p in engine.model.parameters())
    products = count_traffic(core, forwards, backwards, width) + count_traffic(everything - core, 1, 1, width)
    return products + OPTIMIZER_BYTES * parameters


def measure_length(options: argparse.Namespace, length: int, device: torch.device) -> dict[str, Any]:
    """Train and profile at one length; return the figures of COLUMNS, operators' times and table, and the steps."""
    config = load_preset(options, length)
    engine, sampler = build_engine(config, device), DepthSampler(config.depth, config.run.seed)
    clock = make_clock(device, threads=0)
    dtype = getattr(torch, options.precision)
    shapes = count_products(engine.model, options.batch * length)
    rate = measure_product_rate(shapes, backward=True, clock=clock, device=device, dtype=dtype)
    peak, memory = peak_flops(device, options.precision) or rate, measure_bandwidth(device)
    tokens = torch.randint(0, config.model.vocab_size, (options.batch, length + 1))

    def draw_plan(number: int) -> DepthPlan:
        first = number * options.batch
        return sampler.plan(number, range(first, first + options.batch))

    rows = []
    for number in range(options.warmup + options.steps):
        plan = draw_plan(number)
        seconds = measure_seconds(lambda: take_step(engine, tokens, plan), clock)  # noqa: B023  # called at once
        flops = count_training_flops(config.model, plan, length)
        moved = count_step_bytes(engine, plan, length, dtype.itemsize)
        rows.append({"seconds": seconds, "flops": flops, "bytes": moved, "T": statistics.mean(plan.iterations)})
    rows = rows[options.warmup :]
    last = draw_plan(options.warmup + options.steps)
    times, table = profile_step(lambda: take_step(engine, tokens, last), device.type == "cuda")

    def median(value: Any) -> float:
        return statistics.median(value(row) for row in rows)

    return {
        "sequence": length,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "mean T": statistics.mean(row["T"] for row in rows),
        "seconds": median(lambda r: r["seconds"]),
        "tokens/s": median(lambda r: options.batch * length / r["seconds"]),
        "mfu": median(lambda r: r["flops"] / r["seconds"] / peak),
        "of measured rate": median(lambda r: r["flops"] / r["seconds"] / rate),
        "floor at peak, s": median(lambda r: r["flops"] / peak),
        "floor at measured rate, s": median(lambda r: r["flops"] / rate),
        "floor of traffic, s": median(lambda r: r["bytes"] / memory),
        "peak TFLOP/s": peak / 1e12,
        "measured TFLOP/s": rate / 1e12,
        "bandwidth GB/s": memory / 1e9,
        "peak memory GB": peak_memory_gb(device),
        "seconds by kind": times,
        "rows": rows,
        "operators": table,
    }


COLUMNS = {
    "sequence": "d", "mean T": ".2f", "seconds": ".3f", "tokens/s": ".0f", "mfu": ".1%", "of measured rate": ".1%",
    "floor at peak, s": ".3f", "floor at measured rate, s": ".3f", "floor of traffic, s": ".3f", "peak memory GB": ".1f",
}  # fmt: skip


def main() -> None:
    """Print a line per length, then time shares by operator; the default size needs a GPU or --even-on-cpu."""
    parser = make_parser(__doc__, batch=8, out=None)
    parser.add_argument("--preset", type=Path, default=PRESET, help="YAML with model and depth")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the config")
    parser.add_argument("--sequence", type=int, nargs="+", default=[2048, 4096], help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, in which the layers are compiled")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers")
    parser.add_argument("--even-on-cpu", action="store_true", help="the default size without a GPU, too: hours")
    parser.add_argument("--verbose", action="store_true", help="print the costliest operators too")
    options = parser.parse_args()
    device = pick_device()
    if device.type == "cpu" and not (options.set or options.even_on_cpu):
        print("no GPU here: nothing was measured. For a small size on the CPU, see the second command of --help.")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setting = f"torch {torch.__version__}, {options.precision}, {options.batch} sequences"
    print(f"{options.preset.stem} on {name}, {setting}\n\n{format_header(list(COLUMNS))}")
    results = []
    for length in options.sequence:
        results.append(measure_length(options, length, device))
        print(format_row(format(results[-1][key], form) for key, form in COLUMNS.items()), flush=True)
    for row in results:
        print(f"\nsequence {row['sequence']}: {format_shares(row['seconds by kind'])}")
        print(row["operators"] if options.verbose else "", end="")
    kept = [{key: value for key, value in row.items() if key != "operators"} for row in results]
    write_numbers(options, {"device": name, "cases": kept})


if __name__ == "__main__":
    main()
