"""The kernels of a compiled layer, as torch.compile's own scheduler fuses them, without a GPU and without Triton.

A graph is lowered and scheduled as for CUDA, which says which operators share a kernel and what each kernel reads and
writes; no code is generated. Products and attention are kernels of their own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from tools.operator_log import OperatorLog, count_operator_flops, multiplied_dtype


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled graph: what it moves, the FLOPs of a product or of attention, and the type of its input."""

    name: str
    bytes: float
    flops: float
    dtype: torch.dtype | None


def list_kernels(module: GraphModule, inputs: Sequence[Any], is_inference: bool) -> list[Kernel]:
    """List the kernels that the compiler would make of a graph of aten operators."""
    mode = detect_fake_mode(inputs)
    with V.set_fake_mode(mode), DebugContext():
        record_original_output_strides(module)
        _recursive_post_grad_passes(module, is_inference=is_inference)
        graph = GraphLowering(module, shape_env=mode.shape_env, is_inference=is_inference)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            graph._update_scheduler()
            return [_describe(node) for node in graph.scheduler.nodes if not _is_idle(node)]


def _is_idle(node: Any) -> bool:
    """True for a node of the scheduler that runs no kernel, such as a result of several, or the wait for a collective."""
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput | ir._WaitKernel)


def _find_operator(kernel: Any) -> torch.fx.Node | None:
    """Return the operator of the graph that became a kernel of a library."""
    found = kernel.get_origin_node()
    return found or next((each for each in kernel.origins if each.target is getattr(kernel, "op_overload", None)), None)


def _describe(node: Any) -> Kernel:
    """Return what a node of the scheduler moves and computes."""
    from torch._inductor import ir

    moved = float(node.get_read_write_buffers_sizes())
    if isinstance(node.node, ir._CollectiveKernel):
        return Kernel("collective", moved, 0.0, None)
    origin = _find_operator(node.node) if node.is_extern() else None
    if origin is None:
        return Kernel("fused", moved, 0.0, None)
    values = tree_map_only(torch.fx.Node, lambda each: each.meta["val"], (origin.args, origin.kwargs))
    flops = count_operator_flops(origin.target, *values, result=origin.meta.get("val"))
    name = origin.target.name().split("::")[-1].split(".")[0]
    dtype = multiplied_dtype(name, values[0])
    return Kernel(f"{name} {str(dtype).removeprefix('torch.')}" if flops else name, moved, flops, dtype)


def make_logging_backend(log: OperatorLog) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return a backend of torch.compile that logs the fused kernels at every call and runs the graph unlogged."""

    def compile_inner(module: GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        with log.pause():
            kernels = list_kernels(copy.deepcopy(module), inputs, options.get("is_inference", False))
        place = "compiled, backward" if options.get("is_backward") else "compiled"

        def run(arguments: list[Any]) -> Any:
            for kernel in kernels:
                log.add_kernel(kernel.name, kernel.bytes, kernel.flops, kernel.dtype, place)
            values = list(arguments)
            arguments.clear()
            with log.pause():
                return module(*values)

        run._boxed_call = True  # type: ignore[attr-defined]  # takes a list that it may empty
        return run

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_fx(module, list(inputs), inner_compile=compile_inner)  # type: ignore[return-value,arg-type]

    return backend
