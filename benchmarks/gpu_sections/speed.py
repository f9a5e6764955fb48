"""Speed and memory of a GPU: its rates, utilisation of real steps, peak memory against the plan, fragmentation."""

from collections.abc import Iterator
from typing import Any

import torch
from tools.rates import count_training_flops
from torch.nn import functional

from gpu_sections.machine import Finding, Machine, freed_memory
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthSampler
from megatron_rdt.planner.memory import StepDepth, step_memory
from megatron_rdt.train.hardware import peak_flops

SIZE = 8192
# Huginn's core and width with fewer layers around it and a small vocabulary: it fits into 80 GB with its optimizer.
HUGINN_LIKE = [
    "model.prelude_layers=1",
    "model.coda_layers=1",
    "model.vocab_size=8192",
    "depth.checkpoint=per_iteration",
]
# Name: preset, words, sequences, length, k.
STEPS: dict[str, tuple[str, list[str], int, int, int]] = {
    "parcae_1_3b, 4 x 2,048": ("models/parcae_1_3b", [], 4, 2048, 4),
    "huginn-like, 1 x 4,096": ("models/huginn_3_5b", HUGINN_LIKE, 1, 4096, 4),
}
LOOPS = 8
DRAWN_STEPS = 6
# One draw of T after another, far apart, so that each step frees blocks that do not fit the next one's.
CHANGING = (8, 3, 12, 5, 16, 2, 9, 11, 4, 14, 7, 10)


def measure_rates(machine: Machine) -> Iterator[Finding]:
    """Rates that bound everything else: products, attention, memory (compare with those of roofline.py)."""
    n = 256 if machine.dry else SIZE
    for dtype, precision in ((torch.bfloat16, "high"), (torch.float32, "high"), (torch.float32, "highest")):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=machine.device, dtype=dtype) for _ in range(2))
        rate = 2 * n**3 / machine.measure_seconds(lambda: a @ b)  # noqa: B023
        name = "TF32" if dtype == torch.float32 and precision == "high" else str(dtype).removeprefix("torch.")
        yield Finding(f"products, {name}", f"{rate / 1e12:.0f} TFLOP/s", figures={"flops": rate})
    length = 128 if machine.dry else 4096
    q, k, v = (
        torch.randn(4, 16, length, 128, device=machine.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def attend() -> None:
        functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(q)

    rate = (
        3.5 * 2 * 4 * 16 * length**2 * 128 / machine.measure_seconds(attend)
    )  # half of 4 s^2 d forward, 2.5 times that back
    yield Finding("causal attention, forward and backward", f"{rate / 1e12:.0f} TFLOP/s", figures={"flops": rate})
    source = torch.empty(1 << (20 if machine.dry else 30), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / machine.measure_seconds(lambda: target.copy_(source))
    yield Finding("copy, read and written", f"{rate / 1e12:.2f} TB/s", figures={"bytes_per_second": rate})


def measure_steps(machine: Machine) -> Iterator[Finding]:
    """Utilisation of compiled steps at T = 8 and with T drawn by the preset, and peak memory against the plan."""
    for name, (preset, words, sequences, length, k) in STEPS.items():
        for compiled in ("layers", "none"):
            with freed_memory(machine):
                settings = ["train.precision=bfloat16", f"train.compile={compiled}", f"depth.backprop={k}"]
                config = machine.load_config([*words, *settings], sequences, length, preset)
                engine = machine.build_engine(config)
                peak = peak_flops(machine.device, "bfloat16")
                fixed = machine.draw_batch(config, (LOOPS,) * sequences)

                def take_step(batch: list[Any]) -> None:
                    engine.forward_backward(batch)  # noqa: B023
                    engine.clip(1.0)  # noqa: B023
                    engine.step(1e-4)  # noqa: B023

                take_step(fixed)  # compiles, and creates the moments
                if not machine.dry:
                    torch.cuda.reset_peak_memory_stats()
                seconds = machine.measure_seconds(lambda: take_step(fixed))  # noqa: B023
                flops = count_training_flops(config.model, fixed[0].plan, config.train.sequence_length)
                label = f"{name}, {'compiled' if compiled == 'layers' else 'not compiled'}"
                yield report_rate(f"{label}, T = {LOOPS}", flops, seconds, peak)
                if not machine.dry:
                    allocated = torch.cuda.max_memory_allocated()
                    plan = step_memory(config, Layout.of(config.parallel, 1), True, StepDepth(LOOPS, k)).peak
                    yield Finding(
                        f"{label}, memory",
                        f"{allocated / 1e9:.2f} GB, planned {plan / 1e9:.2f} ({plan / allocated - 1:+.1%})",
                        abs(plan / allocated - 1) < 0.1,
                        {"allocated": allocated, "planned": plan},
                    )
                if compiled == "layers":
                    sampler = DepthSampler(config.depth, 1234)
                    plans = [sampler.plan(n, range(n * sequences, (n + 1) * sequences)) for n in range(DRAWN_STEPS)]
                    drawn = [machine.draw_batch(config, plan.iterations, seed=n) for n, plan in enumerate(plans)]
                    flops = sum(
                        count_training_flops(config.model, b[0].plan, config.train.sequence_length) for b in drawn
                    )
                    seconds = machine.measure_seconds(lambda: [take_step(batch) for batch in drawn], calls=1)  # noqa: B023
                    yield report_rate(f"{label}, T drawn, {DRAWN_STEPS} steps", flops, seconds, peak)


def report_rate(case: str, flops: float, seconds: float, peak: float | None) -> Finding:
    """Return the finding of useful FLOPs in some seconds."""
    figures = {"seconds": seconds, "flops": flops, "mfu": flops / seconds / peak if peak else None}
    share = f"MFU {flops / seconds / peak:.1%}" if peak else "MFU unknown: no peak for this device"
    return Finding(case, f"{seconds * 1e3:.0f} ms, {flops / seconds / 1e12:.1f} TFLOP/s, {share}", figures=figures)


def measure_fragmentation(machine: Machine) -> Iterator[Finding]:
    """Reserved over allocated memory while T changes from step to step."""
    if machine.dry:
        yield Finding("all", "needs a GPU: the CPU has no caching allocator")
        return
    with freed_memory(machine):
        config = machine.load_config(["train.precision=bfloat16", "depth.backprop=4"], 4, 2048, "models/parcae_1_3b")
        engine = machine.build_engine(config)
        for loops in CHANGING:
            engine.forward_backward(machine.draw_batch(config, (loops,) * 4))
            engine.discard_gradients()
        stats = torch.cuda.memory_stats()
        allocated, reserved = stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]
        retries, waste = stats["num_alloc_retries"], reserved / allocated - 1
        yield Finding(
            "parcae_1_3b, T from 2 to 16",
            f"allocated {allocated / 1e9:.1f} GB, reserved {reserved / 1e9:.1f} ({waste:+.1%}), {retries} retries",
            retries == 0,
            {"allocated": allocated, "reserved": reserved, "retries": retries},
        )
