"""Activation checkpointing of the loop: what is kept for the backward pass, and what is computed again there.

    none           everything is kept
    per_iteration  the state between iterations
    n              the state after every n-th iteration; n iterations are computed again at a time
    selective      the state, and inside an iteration the results of matrix products and attention: the rest is cheap
    per_layer      the input of every layer, of prelude and coda too

Always the non-reentrant kind: the reentrant one gives wrong gradients under sharding, without an error.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_rdt.depth.plan import CoreIteration
from megatron_rdt.model.layer import Layer

# Operators whose results `selective` keeps, by name: not every build of PyTorch has all of them.
_PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"),
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_KEPT_OPERATORS = {getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(torch.ops.aten, name)}


def _choose_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return the policy of `selective` for an operator: save matrix products and attention, recompute the rest."""
    flex = "flex_attention" in str(operator)  # no operator of aten
    return CheckpointPolicy.MUST_SAVE if flex or operator in _KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointing:
    """Runs the recurrent core's iterations under a policy where they carry gradient.

    Args:
        policy: `depth.checkpoint`.
    """

    def __init__(self, policy: int | str = "none") -> None:
        self.policy = policy
        self.span = policy if isinstance(policy, int) else 1

    def segments(self, iterations: Iterable[CoreIteration]) -> Iterator[list[CoreIteration]]:
        """Yield segments of iterations: up to n for policy n, else 1; same sequences, all with gradient or none."""
        for _, alike in groupby(iterations, key=lambda iteration: (len(iteration.indices), iteration.with_grad)):
            run = list(alike)
            for first in range(0, len(run), self.span):
                yield run[first : first + self.span]

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`; keep what the policy says, and let the backward pass compute the rest again."""
        if self.policy in ("none", "per_layer"):
            return function(*args)
        extra: dict[str, Any] = {}
        if self.policy == "selective":
            extra["context_fn"] = partial(create_selective_checkpoint_contexts, _choose_policy)
        # Nothing in the model draws random numbers, so no generator's state has to be kept.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **extra)


def set_checkpointing(model: nn.Module, policy: int | str) -> None:
    """Run a model's loop, and with `per_layer` its layers, under a policy of `depth.checkpoint` from now on."""
    model.core.checkpointing = Checkpointing(policy)  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, Layer):
            module.checkpointed = policy == "per_layer"
