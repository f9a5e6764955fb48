"""A log of every operator on CUDA tensors, real or fake: bytes, FLOPs, time at given rates, place, and waits of the host.

An operator's bytes are those of the tensors that it reads and writes, each once; its time is the larger of its bytes over
the memory's bandwidth and its FLOPs over the rate of its kind. Time between kernels, and their launches, are not in it.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_rdt.devices import DEVICES, Rates, attained_rates
from megatron_rdt.parallel.dtensor_views import local_shard

# Operators that make the host wait for the device.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
# Operators that run no kernel, besides those that return views.
IDLE = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "empty_strided",
    "lift_fresh",
    "is_same_size",
}
# Matrix products, and the position of their first matrix.
PRODUCTS = {
    "_scaled_mm": 0,
    "mm": 0,
    "bmm": 0,
    "_grouped_mm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "add_product_": 1,
    "add_weight_gradient_": 1,
}
# Operators that read nothing of their arguments.
CREATORS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# Operators that read only some rows of their first argument.
LOOKUPS = {"embedding", "index", "gather", "index_select"}


H100 = attained_rates(DEVICES["h100"])


@dataclass
class Entry:
    """Sum over the calls of one kernel at one place."""

    calls: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor occupies on this rank; a dimension that repeats the same numbers counts once."""
    tensor = local_shard(tensor)
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or size == 0)
    return math.prod(sizes) * tensor.element_size()


def count_operator_bytes(name: str, arguments: Iterable[Tensor], results: Iterable[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    arguments, results = list(arguments), list(results)
    if name in CREATORS:
        return sum(map(tensor_bytes, results))
    if name == "index_copy_":
        return sum(map(tensor_bytes, arguments[1:])) + tensor_bytes(arguments[2])
    if name in LOOKUPS:
        return sum(map(tensor_bytes, arguments[1:])) + 2 * sum(map(tensor_bytes, results))
    if name in ("index_put_", "_index_put_impl_"):
        return (
            sum(map(tensor_bytes, arguments[1:]))
            + 2 * max(x.numel() for x in arguments[1:]) * arguments[0].element_size()
        )
    return sum(map(tensor_bytes, [*arguments, *results]))


def list_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors that an operator without results writes: fused optimizers, which write gradients only where they scale them."""
    written = [
        value
        for argument, value in zip(func._schema.arguments, args)
        if argument.alias_info is not None and argument.alias_info.is_write
        if argument.name != "grads" or kwargs.get("grad_scale") is not None
    ]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


def is_causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if an operator of attention is called with `is_causal`."""
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return False
    position = names.index("is_causal")
    return bool(args[position] if position < len(args) else kwargs.get("is_causal", False))


def multiplied_dtype(name: str, args: tuple[Any, ...]) -> torch.dtype | None:
    """The type of the tensors that a product or attention multiplies; of other operators that of the first, if any."""
    return next((x.dtype for x in args[PRODUCTS.get(name, 0) :] if isinstance(x, Tensor)), None)


def count_operator_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    """FLOPs of a matrix product or of attention; 0 for any other operator."""
    name = func.name().split("::")[-1].split(".")[0]
    if name in PRODUCTS:  # of a grouped product each row, or each column, has a matrix of its own: the same number
        left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
        return 2.0 * left.numel() * right.shape[-1]
    counter = flop_registry.get(func._overloadpacket) if "attention" in name else None
    if counter is None:
        return 0.0
    flops = float(counter(*args, **kwargs, out_val=result))
    return flops / 2 if is_causal(func, args, kwargs) else flops


class OperatorLog(TorchDispatchMode):
    """Logs the operators that run while it is active.

    Attributes:
        rates: of the device whose time is meant.
        phase: name of what runs now; set it.
        entries: by (phase, kernel, place).
        waits: calls that make the host wait for the device, by operator and place.
        kernels: number of kernels that were started.
    """

    def __init__(self, rates: Rates = H100) -> None:
        super().__init__()
        self.rates, self.phase, self.kernels = rates, "", 0
        self.entries: dict[tuple[str, str, str], Entry] = defaultdict(Entry)
        self.waits: dict[str, int] = defaultdict(int)
        self._paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, so that torch.compile works while this mode is active."""
        return True

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Log nothing within."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def seconds(self) -> float:
        """Time of all kernels."""
        return sum(entry.seconds for entry in self.entries.values())

    def add_kernel(self, name: str, moved: float, flops: float, dtype: torch.dtype | None, place: str) -> None:
        """Add a kernel that moves so many bytes and computes so many FLOPs, in products of `dtype`."""
        entry = self.entries[self.phase, name, place]
        self.kernels += 1
        entry.calls += 1
        entry.bytes += moved
        entry.flops += flops
        rate = self.rates.attention if "attention" in name else self._product_rate(dtype)
        entry.seconds += max(moved / self.rates.memory, flops / rate)

    def _product_rate(self, dtype: torch.dtype | None) -> float:
        """FLOP/s of products of tensors of this type."""
        if dtype == torch.float8_e4m3fn:
            return self.rates.float8_products
        if dtype not in (torch.float32, torch.float64):
            return self.rates.products
        tf32 = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
        return self.rates.tf32_products if tf32 else self.rates.float32_products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and log an operator; what the host would wait for is a made-up number."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = func.name().split("::")[-1].split(".")[0]
        arguments = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.is_cuda for x in arguments)
        if name in WAITS and on_device:
            self.waits[f"{name} at {find_place()}"] += 1
            if name == "_local_scalar_dense":
                return {torch.bool: True}.get(arguments[0].dtype, 1.0 if arguments[0].is_floating_point() else 1)
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not on_device and not any(x.is_cuda for x in results):
            return result
        self._log_copy(name, args, kwargs, arguments, results)
        returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if returns_view or name in IDLE or not (results or func._schema.is_mutable):
            return result
        flops = count_operator_flops(func, args, kwargs, result)
        moved = count_operator_bytes(name, arguments, results or list_written(func, args, kwargs))
        dtype = multiplied_dtype(name, args)
        kernel = f"{name} {str(dtype).removeprefix('torch.')}" if flops else name
        self.add_kernel(kernel, moved, flops, dtype, find_place())
        return result

    def _log_copy(
        self, name: str, args: Any, kwargs: dict[str, Any], arguments: list[Tensor], results: list[Tensor]
    ) -> None:
        """Log a copy between host and device that the host waits for."""
        if name not in ("_to_copy", "copy_") or len({x.device.type for x in [*arguments, *results]}) == 1:
            return
        asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if not asynchronous:
            self.waits[f"copy between host and device at {find_place()}"] += 1


def find_place() -> str:
    """File, line and function of the package that the current operator comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/megatron_rdt/")
        if found:
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd or optimizer"


@auto_functionalized_v2.py_impl(OperatorLog)
def _run_mutable_operator(mode: OperatorLog, *args: Any, **kwargs: Any) -> Any:
    """Run an operator that changes its inputs, as a graph before its kernels are chosen calls it, unlogged."""
    return auto_functionalized_v2(*args, **kwargs)
