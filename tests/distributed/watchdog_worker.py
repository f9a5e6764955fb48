"""Training on ranks of which one hangs."""

import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from launch.pretrain import main
from megatron_rdt.model.core import RecurrentCore


def train_with_hang(words: Sequence[str], rank: int, calls: int) -> NoReturn:
    """Run the training script; `rank` hangs after `calls` iterations of the core, in the middle of a step."""
    if int(os.environ["RANK"]) == rank:
        iterate, done = RecurrentCore.iterate, [0]

        def wait(self: RecurrentCore, *arguments: Any, **named: Any) -> Any:
            done[0] += 1
            if done[0] > calls:
                time.sleep(1000)
            return iterate(self, *arguments, **named)

        RecurrentCore.iterate = wait  # type: ignore[method-assign]
    raise SystemExit(main(list(words)))
