"""Roofline of a training step on one GPU, without a GPU: the utilisation that the kernels of a real step allow at most.

A preset's step runs on fake CUDA tensors, which have shapes and no memory. Every kernel is counted with its bytes and FLOPs,
compiled layers as torch.compile fuses them, and takes the larger of two times, at rates that an H100 attains: 600 TFLOP/s in
bfloat16 products, 300 in TF32, 50 in float32, 400 in attention, 2.7 TB/s. The sum is the least time of the step; useful FLOPs
(megatron_rdt/model/flops.py) over it and the peak of 989 TFLOP/s are `mfu_bound`. Exact and the same everywhere; a GPU adds
launches, gaps, and kernels that miss these rates. With tensor or context parallelism the step is that of one rank, in a process
group whose other ranks do not exist, and a collective takes the time to read and write its tensors in memory. Beside it stand
the figures of the planner's formulas for the same step (megatron_rdt/planner/kernels.py), whose coefficients are fitted to the
counts on one GPU.

    python benchmarks/roofline.py                                        # a table of the presets of CASES
    python benchmarks/roofline.py --preset huginn_3_5b --json
    python benchmarks/roofline.py --preset parcae_1_3b --sequences 8 --loops 4 --backprop 4 --set train.compile=none
    python benchmarks/roofline.py --preset parcae_1_3b --set parallel.engine=fsdp parallel.tensor=2
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from tools.fake_cuda import install_fake_cuda
from tools.fake_group import join_fake_group
from tools.fused_kernels import make_logging_backend
from tools.operator_log import H100, Entry, OperatorLog
from tools.options import MODELS, PRESETS, make_parser, write_numbers
from tools.rates import count_training_flops
from tools.tables import format_header, format_row
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from megatron_rdt.config import ParallelConfig, RunConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.devices import DEVICES
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.compiling import compile_layers
from megatron_rdt.parallel import MicroBatch, make_engine
from megatron_rdt.parallel.context_parallel import ContextParallel
from megatron_rdt.parallel.mesh import make_meshes
from megatron_rdt.parallel.process_group import allow_tf32
from megatron_rdt.parallel.tensor_parallel import parallelize_tensors
from megatron_rdt.planner.kernels import LAUNCH_SECONDS, StepKernels


@dataclass(frozen=True)
class Case:
    """A micro-batch of a preset, as published: sequences, tokens of each, T, and k (None: all T)."""

    sequences: int
    length: int
    loops: int
    backprop: int | None


CASES = {
    "huginn_3_5b": Case(1, 4096, 33, 8),
    "parcae_1_3b": Case(4, 2048, 8, 4),
    "parcae_140m": Case(8, 2048, 8, 4),
    "openmythos_1b": Case(2, 4096, 16, None),
}


def load_case(preset: str, case: Case, settings: list[str]) -> RunConfig:
    """Load a preset for one GPU with the case's micro-batch, AdamW, compiled layers and the keys of --set."""
    batch = [f"train.micro_batch={case.sequences}", f"train.global_batch={case.sequences}"]
    fixed = [*batch, f"train.sequence_length={case.length}", "parallel.engine=single", "optimizer.name=adamw"]
    return load_config(MODELS / f"{preset}.yaml", [*fixed, "train.compile=layers", *settings])


def log_step(config: RunConfig, case: Case) -> OperatorLog:
    """Run a step on fake tensors; return its log, in the phases forward, backward, clip, optimizer."""
    log = OperatorLog(H100)
    allow_tf32(config.train.precision)
    # Compiled below, with a backend that logs; nothing is sharded over samples.
    plain = replace(config, parallel=ParallelConfig(), train=replace(config.train, compile="none"))
    engine = make_engine(plain, torch.device("cuda", 0))
    plan = DepthPlan((case.loops,) * case.sequences, case.backprop, tuple(range(1, case.sequences + 1)))
    # Compiled code keeps sizes: those of one case do not vary, and fake kernels need numbers.
    torch._dynamo.maybe_mark_dynamic = lambda tensor, index: None
    torch._dynamo.config.automatic_dynamic_shapes = False
    layout = layout_of_one_sample(config)
    with join_fake_group(0, layout.world_size), FakeTensorMode(allow_non_fake_inputs=True):
        with unset_fake_temporarily():
            meshes = make_meshes(layout, engine.device, config.parallel.timeout_s)
        with torch.device("cuda"):
            model = RecurrentDepthTransformer(config.model)
        if meshes.tensor is not None:
            parallelize_tensors(model, meshes.tensor)
        engine.configure_model(model)
        if config.train.compile == "layers":
            compile_layers(model, backend=make_logging_backend(log))
        engine.make_optimizers(model)  # type: ignore[attr-defined]
        engine.module = model if meshes.context is None else ContextParallel(model, meshes.context.get_group())
        ids = torch.empty(case.sequences, case.length + 1, dtype=torch.int64, device="cuda")
        backward = engine.backward

        def log_backward(loss: torch.Tensor, last: bool) -> None:
            log.phase = "backward"
            backward(loss, last)
            log.phase = "rest"

        engine.backward = log_backward  # type: ignore[method-assign]
        create_moments(engine.optimizers)  # type: ignore[attr-defined]
        with log:
            log.phase = "forward"
            engine.forward_backward([MicroBatch(Batch(ids), plan)])
            log.phase = "clip"
            norm = engine.clip(1.0)
            log.phase = "optimizer"
            engine.step(1e-3, torch.isfinite(norm))
    return log


def layout_of_one_sample(config: RunConfig) -> Layout:
    """Return the layout of the ranks that share a sequence: tensor and context parallelism alone."""
    return Layout(tensor=config.parallel.tensor, context=config.parallel.context)


def create_moments(optimizers: list[torch.optim.Optimizer]) -> None:
    """Take a step with gradients of zero, so that the step that is logged creates no moments."""
    for optimizer in optimizers:
        for parameter in [each for group in optimizer.param_groups for each in group["params"]]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def summarize(preset: str, case: Case, config: RunConfig, log: OperatorLog) -> dict[str, Any]:
    """Return the figures of a logged step."""
    plan = DepthPlan((case.loops,) * case.sequences, case.backprop, tuple(range(case.sequences)))
    useful = count_training_flops(config.model, plan, case.length)
    layout = layout_of_one_sample(config)
    useful /= layout.world_size
    kernels = StepKernels(config, layout, DEVICES["h100"])
    planned = kernels.micro_batch(case.loops, min(case.loops, case.backprop or case.loops)) + kernels.optimizer_step()
    by_kernel, by_place, by_phase = (sum_entries(log, part) for part in (1, 2, 0))
    return {
        "preset": preset,
        **vars(case),
        "mfu_bound": useful / H100.peak / log.seconds,
        "seconds": log.seconds,
        "useful_flops": useful,
        "kernels": log.kernels,
        "launch_seconds": log.kernels * LAUNCH_SECONDS,
        "planned_seconds": planned.seconds,
        "planned_kernels": round(planned.kernels),
        "waits": dict(log.waits),
        "by_phase": by_phase,
        "by_kernel": by_kernel,
        "by_place": by_place,
    }


def sum_entries(log: OperatorLog, part: int) -> dict[str, dict[str, float]]:
    """Sum the log's entries by phase (part 0), kernel (1) or phase and place (2), the longest first."""
    sums: dict[str, Entry] = defaultdict(Entry)
    for key, entry in log.entries.items():
        total = sums[f"{key[0]}: {key[2]}" if part == 2 else key[part]]
        for field, value in vars(entry).items():
            setattr(total, field, getattr(total, field) + value)
    return {key: vars(entry) for key, entry in sorted(sums.items(), key=lambda pair: -pair[1].seconds)}


def print_details(numbers: dict[str, Any], lines: int) -> None:
    """Print the longest kernels and places of a step."""
    for title in ("by_phase", "by_kernel", "by_place"):
        print()
        print(format_header([title.removeprefix("by_"), "calls", "ms", "share", "GB", "TFLOP"], left=1))
        for key, entry in list(numbers[title].items())[:lines]:
            share = f"{entry['seconds'] / numbers['seconds']:.1%}"
            cells = (
                f"{entry['seconds'] * 1e3:.1f}",
                share,
                f"{entry['bytes'] / 1e9:.1f}",
                f"{entry['flops'] / 1e12:.1f}",
            )
            print(format_row([key, entry["calls"], *cells]))
    for wait, calls in numbers["waits"].items():
        print(f"\nThe host waits {calls} times: {wait}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, out=None)
    parser.add_argument("--preset", choices=PRESETS, help="default: CASES")
    parser.add_argument("--sequences", type=int, help="sequences of the micro-batch")
    parser.add_argument("--length", type=int, help="tokens per sequence")
    parser.add_argument("--loops", type=int, help="T")
    parser.add_argument("--backprop", type=int, help="k, iterations with gradient; default: of the case, or all T")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the config")
    parser.add_argument("--lines", type=int, default=20, help="rows of each table of details")
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    return parser.parse_args()


def choose_case(options: argparse.Namespace, preset: str) -> Case:
    """Return the preset's case with the sizes of the command line; a preset without one takes its config's."""
    if preset in CASES:
        base = CASES[preset]
    else:
        config = load_config(MODELS / f"{preset}.yaml", [])
        backprop = None if config.depth.backprop == "all" else int(config.depth.backprop)
        base = Case(config.train.micro_batch, config.train.sequence_length, round(config.depth.mean), backprop)
    given = {name: value for name in vars(base) if (value := getattr(options, name)) is not None}
    return Case(**{**vars(base), **given})


def main() -> None:
    """Print a row per preset, and the details of a single one; or one object with --json."""
    options = parse_options()
    install_fake_cuda()
    found = []
    for preset in [options.preset] if options.preset else CASES:
        case = choose_case(options, preset)
        config = load_case(preset, case, options.set)
        found.append(summarize(preset, case, config, log_step(config, case)))
    write_numbers(options, {"rows": found})
    if options.json:
        print(json.dumps(found[0] if options.preset else found, indent=2))
        return
    columns = [
        "preset",
        "micro-batch",
        "T",
        "k",
        "MFU bound",
        "ms",
        "useful TFLOP",
        "kernels",
        "launches, ms",
        "host waits",
        "planned: ms",
        "kernels",
    ]
    print(format_header(columns, left=2))
    for row in found:
        size = f"{row['sequences']} x {row['length']:,}", row["loops"], row["backprop"] or "all"
        times = f"{row['mfu_bound']:.1%}", f"{row['seconds'] * 1e3:.1f}", f"{row['useful_flops'] / 1e12:.1f}"
        host = row["kernels"], f"{row['launch_seconds'] * 1e3:.0f}", sum(row["waits"].values())
        pairs = (("planned_seconds", "seconds", 1e3), ("planned_kernels", "kernels", 1))
        planned = (f"{row[a] * unit:,.0f} ({row[a] / row[b] - 1:+.0%})" for a, b, unit in pairs)
        print(format_row([row["preset"], *size, *times, *host, *planned]))
    if options.preset:
        print_details(found[0], options.lines)


if __name__ == "__main__":
    main()
