"""Training on ranks of which some fail in an evaluation or in the generation of samples."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn

from launch.pretrain import main
from megatron_rdt.train import inspections


def train_with_fault(words: Sequence[str], fault: str, ranks: Sequence[int]) -> NoReturn:
    """Run the training script with a fault on some of the ranks.

    Args:
        words: options of the run.
        fault: "sampling" or "evaluation": after a forward pass, where ranks agree; "forward": in a forward pass of a
            sample, in the middle of its collectives.
        ranks: those that fail.
    """
    inspections.AGREEMENT_S = 3.0
    if int(os.environ["RANK"]) in ranks:
        {"sampling": break_sampling, "evaluation": break_evaluation, "forward": break_forward}[fault]()
    raise SystemExit(main(list(words)))


def fail(*_: Any, **__: Any) -> NoReturn:
    """Raise as a bug would."""
    raise ValueError("a bug")


def break_sampling() -> None:
    """Let the choice of a token fail."""
    sys.modules["megatron_rdt.inference.generate"].pick_tokens = fail  # type: ignore[attr-defined]


def break_evaluation() -> None:
    """Let an evaluation fail after its first forward pass."""
    original: Callable[..., Any] = inspections.measure_mixture_losses
    inspections.measure_mixture_losses = lambda *arguments, **named: original(*arguments, **{**named, "progress": fail})


def break_forward() -> None:
    """Let samples fail at the embedding, after which the other ranks gather the weights of the layers."""
    original: Callable[..., Any] = inspections.generate

    def sample(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        model.prelude[0].register_forward_pre_hook(fail)  # type: ignore[index, union-attr]
        return original(model, *arguments, **named)

    inspections.generate = sample  # type: ignore[assignment]
