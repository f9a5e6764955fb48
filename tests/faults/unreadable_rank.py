"""Training on ranks of which one has a disk that refuses to read shards, from some read of the loader on."""

import errno
import itertools
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from tests.distributed.training import run_pretrain


def train_with_bad_disk(words: Sequence[str], rank: int, reads: int, seconds: float | None) -> NoReturn:
    """Run the training script; on one rank the loader's reads fail for some seconds.

    Args:
        words: options of the run.
        rank: with the bad disk.
        reads: of the loader that succeed first.
        seconds: after which the disk is good again; None: never.
    """
    if int(os.environ["RANK"]) == rank:
        read, numbers, end = os.pread, itertools.count(), [math.inf]

        def fail(descriptor: int, *arguments: Any) -> bytes:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            is_data = name.endswith(".bin") and threading.current_thread().name == "batch-loader"
            if is_data and next(numbers) >= reads:
                if seconds is not None and end[0] == math.inf:
                    end[0] = time.monotonic() + seconds
                if time.monotonic() < end[0]:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, *arguments)

        os.pread = fail
    run_pretrain(words)
