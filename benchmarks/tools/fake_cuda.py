"""Fake CUDA tensors in a PyTorch without CUDA: they have shapes, types and a device, but no memory, and nothing is computed.

Call `install_fake_cuda` first, in a process of its own: it cannot be undone. A small C++ file is compiled at the first call
(half a minute, a C++ compiler is needed) and kept in PyTorch's folder of extensions.

Where a PyTorch with CUDA runs one kernel and one without it several operators, `KERNELS` has a stand-in that reads and
writes what the kernel does: attention, RMSNorm, SiLU.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional
from torch.utils.cpp_extension import load

aten = torch.ops.aten

# What the compiler asks about the device; an H100.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, gcnArchName="", multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
)  # fmt: skip


class _RmsNorm(torch.autograd.Function):
    """Reads and writes what the fused RMSNorm kernels do: one forward, one backward; the values are meaningless."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] + x, torch.empty_like(weight)


class _Silu(torch.autograd.Function):
    """Reads and writes what the kernels of SiLU do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return aten.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Call the kernel of attention that CUDA would: flash attention, or the memory-efficient one where widths differ."""
    group = query.shape[1] // key.shape[1] if enable_gqa else 1
    if group > 1:  # the kernels take fewer key heads than query heads, but their derivative formulas here do not
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    if attn_mask is None and query.shape[-1] == value.shape[-1]:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, 0.0, is_causal, scale=scale
    )[0]


def _flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Count FlexAttention as causal attention over all keys, which is too many where a window leaves blocks out."""
    return _attend(query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa)


def _is_compiling() -> bool:
    """True while torch.compile captures or traces code."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def _replace_kernels() -> None:
    """Make torch's functions of attention, RMSNorm and SiLU the stand-ins; compiled code sees torch's own formulas."""
    plain_norm, plain_silu = functional.rms_norm, functional.silu

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if _is_compiling() or not x.is_cuda or (weight is not None and weight.dtype != x.dtype):
            return plain_norm(x, shape, weight, eps)
        return _RmsNorm.apply(x, torch.empty(shape, dtype=x.dtype, device=x.device) if weight is None else weight)

    def silu(x: Tensor, inplace: bool = False) -> Tensor:
        return plain_silu(x, inplace) if _is_compiling() or not x.is_cuda else _Silu.apply(x)

    functional.rms_norm = rms_norm  # type: ignore[assignment]
    functional.silu = silu  # type: ignore[assignment]
    functional.scaled_dot_product_attention = _attend
    from torch.nn.attention import flex_attention

    from megatron_rdt.model.attention import kernels

    flex_attention.flex_attention = _flex_attend
    kernels._compiled_flex_attention = lambda: _flex_attend


def install_fake_cuda() -> None:
    """Let this process run fake CUDA tensors, and its compiler lower code for them, until it ends."""
    module = load(name="fake_cuda_guard", sources=[str(Path(__file__).with_name("fake_cuda_guard.cpp"))], verbose=False)
    if not module.install():
        raise RuntimeError("fake CUDA does not work with this PyTorch")
    import torch._dynamo.device_interface as interfaces
    from torch._inductor import scheduler
    from torch._subclasses import fake_tensor

    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment,method-assign]
    fake_tensor.init_gpu_context = lambda device: None  # type: ignore[assignment]
    for owner in (interfaces.CudaInterface, interfaces.CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda device=None: PROPERTIES)  # type: ignore[method-assign]
    interfaces.CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[method-assign]
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.version.cuda = "12.8"
    Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign,assignment]
    torch._inductor.config.joint_graph_constant_folding = False  # it would compute the constants
    # The scheduler fuses without Triton; only code generation, which is not reached, needs it.
    scheduler.has_triton = lambda *arguments: True  # type: ignore[attr-defined]
    _replace_kernels()
