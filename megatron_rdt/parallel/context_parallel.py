"""Context parallelism: each process has some of the tokens of every sequence, and sees the keys of all.

Keys and values of each layer (with latent attention the latents, which are much smaller) are gathered where attention
needs them; everything else is token by token. Of 2n pieces of a sequence the i-th of n processes has the i-th from the
front and the i-th from the back, so that each has as many keys to look at as the others (as in Llama 3, arXiv:2407.21783).
"""

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer
from megatron_rdt.parallel.autograd_collectives import gather

KEYS = 2  # the dimension of (batch, heads, sequence, channels) that is gathered


class OwnPieces:
    """This process's part of the sequences, see `megatron_rdt.model.attention.masks.SequenceShare`.

    Args:
        length: tokens of a whole sequence, a multiple of twice the number of processes.
        group: the processes.
        device: of the positions.
    """

    def __init__(self, length: int, group: ProcessGroup, device: torch.device) -> None:
        self.length, self.group = length, group
        pieces = torch.arange(length, device=device).chunk(2 * group.size())
        owned = [torch.cat((pieces[i], pieces[-1 - i])) for i in range(group.size())]
        self.positions = owned[group.rank()]
        self._order = torch.cat(owned).argsort()

    def gather(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The whole sequence's tensors (batch, heads, length, channels) from those of this part."""
        return tuple(gather(part, KEYS, self.group).index_select(KEYS, self._order) for part in parts)


class ContextParallel(nn.Module):
    """A model that is called with whole sequences and computes this process's part of them.

    Its losses are those of the part, times the number of processes, so that their mean over processes is that of all.
    """

    def __init__(self, model: RecurrentDepthTransformer, group: ProcessGroup) -> None:
        super().__init__()
        self.model, self.group = model, group

    def forward(
        self,
        tokens: torch.Tensor,
        depth: DepthPlan | int,
        *,
        targets: torch.Tensor,
        loss_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        monitor: CoreMonitor | None = None,
    ) -> dict[str, Any]:
        """As `RecurrentDepthTransformer.forward` with targets."""
        share = OwnPieces(tokens.shape[1], self.group, tokens.device)
        own = share.positions
        losses = self.model(
            tokens[:, own],
            depth,
            targets=targets[:, own],
            loss_mask=None if loss_mask is None else loss_mask[:, own],
            positions=None if positions is None else positions[:, own],
            documents=documents,
            monitor=monitor,
            share=share,
        )
        return {name: loss * self.group.size() for name, loss in losses.items()}
