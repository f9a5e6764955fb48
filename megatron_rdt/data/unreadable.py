"""Samples whose shard cannot be read: tried again for a while, then the end of the run, or left out."""

import dataclasses
import logging
import socket
import threading
import time

import numpy as np
import torch

from megatron_rdt.data.batch import Batch
from megatron_rdt.data.mixture import Mixture, interleave
from megatron_rdt.errors import DataError
from megatron_rdt.object_collectives import rank_and_world_size

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0

logger = logging.getLogger(__name__)  # its warnings are rank 0's; a rank's disk is its own


class PatientReader:
    """A `SampleReader` of a mixture that bears with shards that cannot be read.

    An error of the disk or network may pass, so its shards are opened and read again. Other content does not: a shard that
    was replaced or cut short is never waited for.

    Args:
        mixture: the corpora.
        patience_s: how long to try again; nobody can use the batch meanwhile.
        leave_out: afterwards, give sequences without targets in place of those that cannot be read. All batches have loss
            masks then, since one rank does not know of another's shards.
        is_over: set when nobody waits for samples any more.

    Attributes:
        left_out: number of samples in whose place there was none.
    """

    def __init__(self, mixture: Mixture, patience_s: float, leave_out: bool, is_over: threading.Event) -> None:
        self.seed, self.left_out = mixture.seed, 0
        self._mixture, self._patience_s, self._leave_out, self._is_over = mixture, patience_s, leave_out, is_over
        self._example: Batch | None = None  # one row, for the form of those that cannot be read
        self._has_given_up = False  # since something was readable last
        self._who = f"rank {rank_and_world_size()[0]} on {socket.gethostname()}"

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Compute the locations of samples."""
        return self._mixture.locate(samples)

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the samples at these locations ahead of `read`, which reports what cannot be read."""
        try:
            self._mixture.prefetch(locations)
        except (DataError, OSError):
            self._mixture.close()

    def read(self, locations: np.ndarray) -> Batch:
        """Read the samples at these locations, one per row.

        Raises:
            DataError: some cannot be read, and are not to be left out.
        """
        try:
            batch = self._mixture.read(locations)
        except (DataError, OSError) as error:
            batch = self._read_again(locations, error)
        else:
            if self._has_given_up:
                logger.error("%s: every shard of the batch can be read again", self._who)
            self._has_given_up = False
        if self._leave_out:
            batch = dataclasses.replace(_with_mask(batch), unreadable=batch.unreadable or (False,) * len(batch))
        self._example = batch.rows(0, 1)
        return batch

    def _read_again(self, locations: np.ndarray, error: Exception) -> Batch:
        """Try until the patience ends; then read what can be read, or raise DataError."""
        began, pause_s, tries = time.monotonic(), FIRST_PAUSE_S, 0
        may_pass = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        waits = may_pass and not self._has_given_up
        if waits and self._patience_s:
            logger.error("%s: %s It is tried again for %.0f s", self._who, _describe(error), self._patience_s)
        while waits and time.monotonic() + pause_s <= began + self._patience_s and not self._is_over.wait(pause_s):
            self._mixture.close()  # a file that was there again is another one, which has to be opened
            pause_s, tries = min(2 * pause_s, LONGEST_PAUSE_S), tries + 1
            try:
                batch = self._mixture.read(locations)
            except (DataError, OSError) as again:
                error = again
                continue
            logger.error("%s: read after %.1f s", self._who, time.monotonic() - began)
            return batch
        if self._leave_out and self._example is not None:
            return self._read_rows(locations, error)
        tried = (
            f" It was tried again {tries} times in {time.monotonic() - began:.0f} s (data.retry_s)." if tries else ""
        )
        raise DataError(f"{self._who}: {_describe(error)}{tried}") from error

    def _read_rows(self, locations: np.ndarray, error: Exception) -> Batch:
        """Read row by row, with an example without targets in place of what cannot be read; say how many these are."""
        assert self._example is not None
        empty = dataclasses.replace(self._example, loss_mask=torch.zeros_like(self._example.tokens, dtype=torch.bool))
        rows, missing = [], [False] * len(locations)
        for number in range(len(locations)):
            try:
                rows.append(_with_mask(self._mixture.read(locations[number : number + 1])))
            except (DataError, OSError):
                self._mixture.close()
                rows.append(empty)
                missing[number] = True
        before, self.left_out = self.left_out, self.left_out + sum(missing)
        if not self._has_given_up or before.bit_length() < self.left_out.bit_length():  # not in every batch
            text = "%s: %s As data.on_unreadable says, training goes on without what cannot be read: %d samples so far"
            logger.error(text, self._who, _describe(error), self.left_out)
        self._has_given_up = True
        merged = interleave(dict(enumerate(rows)), np.arange(len(rows)))
        sources = None if rows[0].sources is None else tuple(row.sources[0] for row in rows if row.sources)
        return dataclasses.replace(merged, sources=sources, unreadable=tuple(missing))


def _with_mask(batch: Batch) -> Batch:
    """Return the batch with a loss mask: of all targets, if it had none."""
    if batch.loss_mask is not None:
        return batch
    return dataclasses.replace(batch, loss_mask=torch.ones_like(batch.tokens, dtype=torch.bool))


def _describe(error: Exception) -> str:
    """Return the sentences of an error, with the file that an OSError is about."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a shard'} cannot be read: {error.strerror}. Fix the disk."
    return str(error)
