"""Batch: rows, ranks' shares and the inputs of a forward pass; numbers and positions of documents."""

import numpy as np
import torch

from megatron_rdt.data.batch import Batch, number_documents, positions_in_documents


def make_batch() -> Batch:
    tokens = torch.arange(12).reshape(4, 3)
    mask = torch.tensor([[True, True, False]] * 4)
    return Batch(
        tokens,
        documents=tokens * 0,
        loss_mask=mask,
        padding=(0, 1, 2, 3),
        samples=(40, 41, 42, 43),
        batch_rows=(4, 5, 6, 7),
    )


def test_rows_keep_all_fields_together() -> None:
    batch = make_batch()
    part = batch.rows(1, 3)
    assert len(part) == 2
    assert part.tokens.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert (part.padding, part.samples, part.batch_rows) == ((1, 2), (41, 42), (5, 6))
    assert (part.positions, part.sources) == (None, None)
    assert part.tokens.data_ptr() == batch.tokens[1].data_ptr(), "a view"
    shares = [batch.rank_rows(rank, 2).samples for rank in range(2)]
    assert shares == [(40, 41), (42, 43)]


def test_inputs_are_shifted_against_targets() -> None:
    batch = make_batch()
    tokens, named = batch.inputs()
    assert set(named) == {"targets", "loss_mask", "documents"}
    assert tokens.tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert named["targets"].tolist() == [[1, 2], [4, 5], [7, 8], [10, 11]]
    assert named["loss_mask"].tolist() == [[True, False]] * 4
    assert batch.counted_targets.tolist() == [1, 4, 7, 10]
    assert Batch(batch.tokens).counted_targets.tolist() == [1, 2, 4, 5, 7, 8, 10, 11]
    assert set(Batch(batch.tokens).inputs()[1]) == {"targets"}


def test_moving_keeps_the_fields_on_the_host() -> None:
    batch = make_batch()
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.device.type == moved.loss_mask.device.type == "meta"  # type: ignore[union-attr]
    assert moved.positions is None
    assert (moved.padding, moved.samples) == (batch.padding, batch.samples)


def test_documents_are_numbered_and_positions_restart() -> None:
    """A document that began before the row has number 0 and positions from the row's start."""
    starts = np.array([[0, 0, 1, 0, 1], [1, 0, 0, 1, 1]], bool)
    assert number_documents(starts).tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 1, 2]]
    assert positions_in_documents(starts).tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 0, 0]]
