"""Context parallelism: each rank has some of the tokens of every sequence, and sees the keys of all.

Keys and values of each layer (with latent attention the latents, which are much smaller) are gathered where attention
needs them; everything else is computed token by token. Among n ranks a sequence is cut into 2n pieces; rank i has the
i-th from the front and the i-th from the back, so that under the causal mask every rank has as many keys to look at as
the others (as in Llama 3, arXiv:2407.21783).
"""

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer
from megatron_rdt.model.cross_entropy import VocabularyShards
from megatron_rdt.model.token_split import WholeTokens
from megatron_rdt.parallel.autograd_collectives import gather_for_split_work

KEYS = 2  # the dimension of (batch, heads, sequence, channels) that is gathered


@functools.lru_cache(maxsize=8)
def assign_positions(length: int, ranks: int, device: torch.device) -> list[torch.Tensor]:
    """Deal a sequence's positions to ranks; return each rank's.

    Args:
        length: tokens of the whole sequence, a multiple of twice the number of ranks.
        ranks: number of ranks.
        device: of the results.
    """
    pieces = torch.arange(length, device=device).chunk(2 * ranks)
    return [torch.cat((pieces[i], pieces[-1 - i])) for i in range(ranks)]


def restore_order(x: torch.Tensor, dim: int, ranks: int) -> torch.Tensor:
    """Put all ranks' tokens, one rank after the other along `dim`, in the order of the sequence."""
    pieces = x.unflatten(dim, (ranks, 2, -1))
    front, back = pieces.select(dim + 1, 0), pieces.select(dim + 1, 1)
    return torch.cat((front, back.flip(dim)), dim).flatten(dim, dim + 1)


class ContextSplitTokens(WholeTokens):
    """Each rank of a group has two pieces of every sequence. There is no cache, so sequences start at position 0.

    Args:
        group: the ranks that split each sequence.
        within: split of this rank's pieces, by tensor parallelism or none.
    """

    def __init__(self, group: ProcessGroup, within: WholeTokens) -> None:
        self.group, self.within = group, within
        self.sequence_shares = group.size()

    def positions(self, start: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Return this rank's positions (tokens,) in the whole sequence; `start`, always 0, is ignored."""
        return assign_positions(tokens * self.group.size(), self.group.size(), device)[self.group.rank()]

    def gather_keys(self, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gather from all ranks, in order, the sequence's keys and values (batch, heads, sequence, channels)."""
        gathered = (gather_for_split_work(each, KEYS, self.group) for each in keys)
        return tuple(restore_order(each, KEYS, self.group.size()) for each in gathered)

    def gather_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the tokens of this rank's pieces, as `within` does."""
        return self.within.gather_tokens(x)

    def scatter_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sum and scatter the tokens of this rank's pieces, as `within` does."""
        return self.within.scatter_sums(x)

    def residual_part(self, values: torch.Tensor) -> torch.Tensor:
        """Select from (..., this rank's tokens) those whose residual stream is here, as `within` splits them."""
        return self.within.residual_part(values)

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of this rank's pieces, as `within` does; the pieces of other ranks are left out."""
        return self.within.sum_over_tokens(values)

    def gather_for_loss(
        self, features: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyShards | None]:
        """Return features, weights and vocabulary split for this rank's tokens only, as `within` does."""
        return self.within.gather_for_loss(features, weights)


class ContextParallel(nn.Module):
    """A model that is called with whole sequences and computes this rank's pieces of them; it sets its `token_split`.

    Its losses are those of the pieces, times the number of ranks, so that their mean over ranks is that of all tokens.
    """

    def __init__(self, model: RecurrentDepthTransformer, group: ProcessGroup) -> None:
        super().__init__()
        self.model, self.group = model, group
        model.token_split = ContextSplitTokens(group, within=model.token_split)

    def forward(
        self,
        tokens: torch.Tensor,
        depth: DepthPlan | int | None = None,
        *,
        loops: Sequence[int] | None = None,
        targets: torch.Tensor,
        loss_mask: torch.Tensor | None = None,
        per_row: bool = False,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        monitor: CoreMonitor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Take whole sequences; return the losses of this rank's tokens by name, times the number of ranks."""
        ranks = self.group.size()
        own = self.model.token_split.positions(0, tokens.shape[1] // ranks, tokens.device)
        losses = self.model(
            tokens[:, own],
            depth,
            loops=loops,
            targets=targets[:, own],
            loss_mask=None if loss_mask is None else loss_mask[:, own],
            per_row=per_row,
            positions=None if positions is None else positions[:, own],
            documents=documents,  # whole: keys are those of the whole sequence
            monitor=monitor,
        )
        return {name: loss * ranks for name, loss in losses.items()}
