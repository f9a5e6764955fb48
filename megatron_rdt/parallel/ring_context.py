"""Contexts of the sequences of a loop ring: a stage needs the positions, mask and tokens of every process's sequences."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rdt.model.attention.kernels import BlockwiseMask, Mask
from megatron_rdt.model.forward_context import LayerContext

PER_SEQUENCE = 4  # dimensions of rotary tables and masks that differ between sequences


def has_own_rows(context: LayerContext, reads_tokens: bool) -> bool:
    """Return True if sequences have contexts of their own, rather than one for all.

    Args:
        context: of a forward pass.
        reads_tokens: layers look up the tokens.
    """
    blockwise = isinstance(context.mask, BlockwiseMask) and context.mask.documents is not None
    tensors = [*context.rotary, *([context.mask] if isinstance(context.mask, Tensor) else [])]
    return reads_tokens or blockwise or any(tensor.dim() >= PER_SEQUENCE for tensor in tensors)


@torch.no_grad()
def gather_rows(context: LayerContext, group: ProcessGroup) -> LayerContext:
    """Return the context of the sequences of all processes, in the order of their ranks."""
    rotary = tuple(_gather(table, group) if table.dim() >= PER_SEQUENCE else table for table in context.rotary)
    return context.replace(rotary=rotary, mask=_gather_mask(context.mask, group), tokens=_gather(context.tokens, group))


def _gather_mask(mask: Mask, group: ProcessGroup) -> Mask:
    """Return the masks of all processes' sequences; one that is the same for all, as it is."""
    if isinstance(mask, BlockwiseMask) and mask.documents is not None:
        documents = _gather(mask.documents, group)
        return BlockwiseMask(mask.sequence, mask.window, documents, mask.device, mask.queries)
    if isinstance(mask, Tensor) and mask.dim() >= PER_SEQUENCE:
        return _gather(mask.view(torch.uint8), group).view(torch.bool)  # not every backend sends booleans
    return mask


def _gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all processes, which have equally many."""
    rows = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(rows, tensor.contiguous(), group=group)
    return rows
