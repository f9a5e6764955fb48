"""Batch: sequences of tokens with everything that a model is told about them; the one container from shard to engine."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# The other fields are Python numbers: they are read on the host, which must not wait for the device.
PER_TOKEN = ("tokens", "labels", "documents", "positions", "loss_mask")


@dataclasses.dataclass(frozen=True)
class Batch:
    """n sequences of L + 1 tokens, one per row. The model's inputs are the columns 0 ... L - 1, its targets 1 ... L.

    Fields that readers leave out are None, or empty for a tuple.

    Attributes:
        tokens: ids, int64 (n, L + 1).
        documents: number of the document that each token belongs to, ascending in each row, int64 (n, L + 1). A token
            attends to its own document only; None: to every token before it.
        positions: position of each token, int64 (n, L + 1); None: 0, 1, ... L in every row.
        loss_mask: True where a token counts as a target, bool (n, L + 1); None: all count. Where one micro-batch of a
            step has a mask, those of all ranks must have one.
        labels: id that is the target in each column, int64 (n, L + 1); None: the tokens themselves.
        padding: number of padding tokens in each row; None for rows that are not packed.
        sources: number of each row's corpus in the run; None where there is one corpus.
        difficulties: difficulty of each row's example; None unless every row holds one document, of a corpus of examples.
        unreadable: True for each row in whose place nothing could be read, so that none of its targets counts; None where
            that ends the run.
        samples: number of each row's sample in the run's order.
        batch_rows: row of each sample in the step's global batch.
    """

    tokens: torch.Tensor
    documents: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    padding: tuple[int, ...] | None = None
    sources: tuple[int, ...] | None = None
    difficulties: tuple[int, ...] | None = None
    unreadable: tuple[bool, ...] | None = None
    samples: tuple[int, ...] = ()
    batch_rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    def rows(self, first: int, end: int) -> "Batch":
        """Return the batch of rows `first` ... `end` - 1; tensors are views."""
        fields: dict[str, Any] = {k: None if value is None else value[first:end] for k, value in vars(self).items()}
        return Batch(**fields)

    def rank_rows(self, data_rank: int, data_ranks: int) -> "Batch":
        """Return one data-parallel rank's equal share of the rows; `data_ranks` divides their number."""
        share = len(self) // data_ranks
        return self.rows(data_rank * share, (data_rank + 1) * share)

    def pin_memory(self) -> "Batch":
        """Return the batch with per-token tensors in page-locked memory; a GPU copies that without blocking."""
        return self._map_per_token(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with per-token tensors on `device`; from pinned memory to a GPU without waiting.

        The copy is queued on the current stream: whatever reads the tensors on that stream runs after it.
        """
        return self._map_per_token(lambda tensor: tensor.to(device, non_blocking=True))

    def _map_per_token(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return a copy with `change` applied to each per-token tensor that is not None."""
        tensors = ((name, getattr(self, name)) for name in PER_TOKEN)
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors if tensor is not None}
        return dataclasses.replace(self, **changed)

    def inputs(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the input tokens and, by name, targets and any loss_mask, documents, positions, (n, L) each."""
        named = {"targets": self.targets}
        if self.loss_mask is not None:
            named["loss_mask"] = self.loss_mask[:, 1:]  # a mask belongs to the token as a target
        if self.documents is not None:
            named["documents"] = self.documents[:, :-1]
        if self.positions is not None:
            named["positions"] = self.positions[:, :-1]
        return self.tokens[:, :-1], named

    @property
    def targets(self) -> torch.Tensor:
        """Ids that the model is to predict, int64 (n, L): labels where there are any, else the next tokens."""
        return (self.tokens if self.labels is None else self.labels)[:, 1:]

    @property
    def counted_targets(self) -> torch.Tensor:
        """Ids of all targets that count, int64 (targets,)."""
        return self.targets.flatten() if self.loss_mask is None else self.targets[self.loss_mask[:, 1:]]


def number_documents(starts: np.ndarray) -> np.ndarray:
    """Return the number of each token's document, counted from 0 in its row, int64 (n, L + 1).

    Args:
        starts: True at each document's first token, bool (n, L + 1). The first token of a row is in document 0 in any case.
    """
    numbers = np.cumsum(starts, axis=1, dtype=np.int64)
    return numbers - numbers[:, :1]


def positions_in_documents(starts: np.ndarray) -> np.ndarray:
    """Compute each token's position in its document, int64 (n, L + 1); a document cut by the row's start counts from there.

    Args:
        starts: True at each document's first token, bool (n, L + 1).
    """
    columns = np.arange(starts.shape[1])
    # The running maximum is the column at which the token's document starts.
    return columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)


def build_document_fields(
    starts: np.ndarray, documents: bool, positions: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Build a batch's `documents` and `positions`, int64 (n, L + 1); None for one that is not wanted.

    Args:
        starts: True at each document's first token, bool (n, L + 1).
        documents, positions: True if the field is wanted.
    """
    return (
        torch.from_numpy(number_documents(starts)) if documents else None,
        torch.from_numpy(positions_in_documents(starts)) if positions else None,
    )
