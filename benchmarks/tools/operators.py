"""Time of a step by kind of operator, from a profile."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Kind -> words; an operator or kernel is of the first kind that has a word of its name.
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "flash", "fmha"),
    "communication": ("nccl", "c10d", "all_gather", "reduce_scatter"),
    "optimizer and clipping": ("adamw", "_foreach", "vector_norm", "multi_tensor", "stack"),
    "matrix products": ("aten::mm", "addmm", "bmm", "grouped_mm", "gemm", "cutlass", "nvjet", "cublas", "linear"),
    "norms": ("rms_norm", "layer_norm", "pow", "rsqrt", "mean", "RMSNorm"),
    "loss": ("logsumexp", "softmax", "exp", "gather", "scatter", "index_put", "CrossEntropy", "nll"),
    "copies": ("copy", "cat", "clone", "contiguous", "memcpy", "fill_", "zero_", "memset", "embedding", "index"),
    "elementwise": ("mul", "add", "sub", "div", "silu", "sigmoid", "relu", "neg", "sum", "threshold", "elementwise",
                    "vectorized", "triton", "Rotation", "Gated", "sin", "cos"),
}  # fmt: skip


def classify_operator(name: str) -> str:
    """The kind of an operator or kernel; "the rest" if none of the words occurs in its name."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word.lower() in lower for word in words)), "the rest")


def time_by_kind(events: Iterable[Any], device: bool) -> dict[str, float]:
    """Seconds by kind, largest first, of the events of `torch.profiler.profile().key_averages()`.

    Args:
        events: operators, and kernels where a GPU was profiled.
        device: count kernels on the GPU, not the operators that start them, whose time would count twice.
    """
    times: dict[str, float] = defaultdict(float)
    for event in events:
        if device and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if device else event.self_cpu_time_total
        times[classify_operator(event.key)] += microseconds / 1e6
    return dict(sorted(times.items(), key=lambda pair: -pair[1]))


def profile_step(step: Callable[[], object], device: bool = False) -> tuple[dict[str, float], str]:
    """Profile a call of `step`, on the GPU if `device`; return seconds by kind and a table of 25 operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device else []
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    order = "self_cuda_time_total" if device else "self_cpu_time_total"
    return time_by_kind(averages, device), averages.table(order, row_limit=25, max_name_column_width=60)


def format_shares(times: dict[str, float]) -> str:
    """One line of text: the share of every kind in the whole time."""
    whole = sum(times.values()) or 1.0
    return ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in times.items())
