"""Placement of an export's weights in vLLM: the part of each that a process holds, and its dtype."""

import torch
from torch import Tensor, nn

from megatron_rdt.convert.hf import PREFIX
from megatron_rdt.parallel.tensor_parallel import split_dimension

VOCABULARY = ("embedding.weight", "head.weight")  # in modules of vLLM, which split and pad them


def storage_dtype(name: str, dimensions: int, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the parameter `name` is stored.

    Matrices of attention, feed-forward and experts, nearly all of the weights, are in the compute dtype. Norms, injection
    and signals act on the residual stream and the state, which are float32, and are so too.
    """
    is_product = dimensions >= 2 and split_dimension(name) is not None
    return compute_dtype if is_product else torch.float32


def local_shape(name: str, shape: torch.Size, processes: int) -> torch.Size:
    """Return the shape of the part of the parameter `name` that each of several processes holds."""
    dim = split_dimension(name)
    return shape if dim is None else torch.Size(s // processes if i == dim else s for i, s in enumerate(shape))


def local_part(name: str, tensor: Tensor, rank: int, processes: int) -> Tensor:
    """Return the part of the parameter `name` that the process `rank` holds, of the shape of `local_shape`."""
    dim = split_dimension(name)
    return tensor if dim is None else tensor.chunk(processes, dim)[rank]


def allocate_parts(model: nn.Module, processes: int, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Replace the parameters and buffers of a model on the meta device by uninitialised local parts on `device`."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = prefix + name
            dtype = storage_dtype(full, parameter.dim(), compute_dtype)
            part = torch.empty(local_shape(full, parameter.shape, processes), dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(part, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def model_name(exported: str) -> str:
    """Return the name of a weight in the model, from its name in an export."""
    return exported.removeprefix(PREFIX)
