"""Cross entropy and misses of every row of a batch at several T: in one process, or shared among the ranks of an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_rdt.data import Batch
from megatron_rdt.parallel import Engine


@dataclass(frozen=True)
class RowScores:
    """Results for each row, (rows,) each, float64 on the CPU.

    Attributes:
        losses: cross entropy, summed over the counted targets.
        targets: number of counted targets.
        misses: number of them that are not the likeliest id.
    """

    losses: Tensor
    targets: Tensor
    misses: Tensor

    @classmethod
    def join(cls, parts: Sequence["RowScores"]) -> "RowScores":
        """Return the rows of all parts, one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("losses", "targets", "misses")))


@dataclass(frozen=True)
class SharedRows:
    """Division of the rows of an evaluation among ranks; the default is one process that scores all of them.

    Attributes:
        data_rank, data_ranks: of this process, and their number.
        copies: ranks that are given the same rows: those that split each sequence, or the weights, between them.
        column_multiple: rows are padded to a number of input columns that is a multiple of this.
        sum_over_ranks: sums a tensor over all ranks.
    """

    data_rank: int = 0
    data_ranks: int = 1
    copies: int = 1
    column_multiple: int = 1
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values


ONE_PROCESS = SharedRows()


def share_among_ranks(engine: Engine) -> SharedRows:
    """Return the division of an evaluation's rows among the ranks of an engine."""
    layout = engine.layout
    return SharedRows(
        data_rank=layout.data_rank(engine.rank),
        data_ranks=layout.data,
        copies=engine.world_size // layout.data,
        # Context ranks take two pieces of each sequence, and tensor ranks split the tokens of these.
        column_multiple=(2 * layout.context if layout.context > 1 else 1) * layout.tensor,
        sum_over_ranks=engine.sum_over_ranks,
    )


def _pad_columns(tensors: dict[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Repeat the last column until the number of columns is a multiple; the loss mask is False there."""
    columns = tensors["tokens"].shape[1]
    padded = torch.arange(-(-columns // multiple) * multiple)
    wider = {name: tensor[:, padded.clamp_max(columns - 1)] for name, tensor in tensors.items()}
    wider["loss_mask"][:, columns:] = False
    return wider


@torch.no_grad()
def score_rows(
    model: nn.Module,
    batch: Batch,
    loops: Sequence[int],
    micro_batch: int,
    device: torch.device,
    shared: SharedRows = ONE_PROCESS,
    progress: Callable[[int], object] | None = None,
) -> dict[int, RowScores]:
    """Return the scores of all rows at each T, the same on every rank.

    Args:
        model: called as model(tokens, loops=[...], targets=..., per_row=True), with the further fields of the batch by name.
        batch: the same on every rank.
        loops: values of T.
        micro_batch: rows per forward pass.
        device: where the model is.
        shared: division of the rows among the ranks.
        progress: called with 1 after each forward pass.
    """
    tokens, named = batch.inputs()
    counted = named.get("loss_mask", torch.ones_like(tokens, dtype=torch.bool))
    tensors = _pad_columns({"tokens": tokens, **named, "loss_mask": counted}, shared.column_multiple)
    count, size, rising = len(tokens), min(micro_batch, len(tokens)), sorted({*loops})
    sums = torch.zeros(2, len(rising), count, dtype=torch.float64, device=device)
    for first in range(0, count, size * shared.data_ranks):
        rows = torch.arange(size) + first + shared.data_rank * size
        own = rows[rows < count]
        # Forward passes are collective where parameters are sharded, so every rank runs equally many of the same shape:
        # where rows are missing the last one is computed again, and its result dropped.
        inputs = {name: tensor[rows.clamp_max(count - 1)].to(device) for name, tensor in tensors.items()}
        scores = model(inputs.pop("tokens"), loops=rising, **inputs, per_row=True)
        sums[..., own] = torch.stack((scores["cross_entropy"], scores["misses"]))[..., : len(own)].double()
        if progress is not None:
            progress(1)
    losses, misses = (shared.sum_over_ranks(sums) / shared.copies).cpu()
    targets = counted.sum(1).double()
    return {t: RowScores(losses[rising.index(t)], targets, misses[rising.index(t)]) for t in loops}


def count_forward_passes(rows: int, micro_batch: int, shared: SharedRows = ONE_PROCESS) -> int:
    """Return how many forward passes `score_rows` runs on each rank for so many rows."""
    return -(-rows // (min(micro_batch, rows) * shared.data_ranks))
