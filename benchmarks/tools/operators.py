"""Where the time of a step goes, by kind of operator."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

# The first kind one of whose words is in the operator's or kernel's name counts.
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


def kind_of(name: str) -> str:
    """The kind of an operator or kernel, "the rest" where none of the words fits."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word.lower() in lower for word in words)), "the rest")


def time_by_kind(events: Iterable[Any], device: bool) -> dict[str, float]:
    """Seconds by kind of the events of `torch.profiler.profile().key_averages()`; on the GPU where `device`.

    On a GPU only the kernels count, not the operators that start them: their time would count twice.
    """
    times: dict[str, float] = defaultdict(float)
    for event in events:
        if device and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        times[kind_of(event.key)] += (event.self_device_time_total if device else event.self_cpu_time_total) / 1e6
    return dict(sorted(times.items(), key=lambda pair: -pair[1]))


def profiled(step: Callable[[], object], device: bool = False) -> tuple[dict[str, float], str]:
    """Seconds by kind of one call of `step`, and the table of its 25 costliest operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device else []
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    order = "self_cuda_time_total" if device else "self_cpu_time_total"
    return time_by_kind(averages, device), averages.table(order, row_limit=25, max_name_column_width=60)


def shares(times: dict[str, float]) -> str:
    """One line: each kind's share of the whole."""
    whole = sum(times.values()) or 1.0
    return ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in times.items())
