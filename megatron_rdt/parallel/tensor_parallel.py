"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): each rank has some of the heads, channels and vocabulary.

Between attention and feed-forward a rank holds some of the tokens instead, so the residual stream, the recurrent state,
all norms and the injection are split too (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198):

    some tokens -> all-gather -> attention or feed-forward with some heads or channels -> reduce-scatter -> some tokens

The embedding and the output matrix are split by vocabulary. Logits stay split: their cross entropy takes one exchange of
two numbers per token.
"""

import re
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.feedforward import SwiGLU
from megatron_rdt.model.rdt import Embedding
from megatron_rdt.model.token_split import WholeTokens
from megatron_rdt.parallel.autograd_collectives import (
    all_gather,
    gather_for_same_work,
    gather_for_split_work,
    reduce_scatter_with_grad,
    sum_with_own_grad,
)
from megatron_rdt.parallel.dtensor_views import make_dtensor, make_views, view_locally
from megatron_rdt.parallel.expert_parallel import find_mixtures

TOKENS = 1  # the dimension of activations (batch, sequence, channels) that is split between the layers' parts

# Pattern at the end of a parameter's name, and the dimension along which that parameter is split. A parameter that
# matches none is whole on every rank.
SPLIT_DIMENSIONS: list[tuple[str, int]] = [
    (r"(^|\.)(embedding|head)\.weight", 0),
    # Grouped-query: by heads.
    (r"attention\.(query|key|value)\.weight", 0),
    (r"attention\.(query|key|value)_bias", 0),
    (r"attention\.token_values\.weight", 1),
    (r"attention\.token_values\.gate\.weight", 0),
    # Latent: the matrices that expand to heads; every rank computes the latents themselves in full.
    (r"attention\.(query|latent)_up\.weight", 0),
    (r"attention\.output\.weight", 1),
    # Dense and shared feed-forward: by inner channels.
    (r"(feedforward|shared)\.(gate|up)\.weight", 0),
    (r"(feedforward|shared)\.down\.weight", 1),
    # Experts, (experts, ...): each by inner channels.
    (r"feedforward\.(gate|up)", 1),
    (r"feedforward\.down", 2),
]


def split_dimension(name: str) -> int | None:
    """Return the dimension along which the parameter `name` is split, None where every rank has it whole."""
    return next((dim for pattern, dim in SPLIT_DIMENSIONS if re.search(pattern + "$", name)), None)


def parallelize_tensors(model: RecurrentDepthTransformer, mesh: DeviceMesh) -> None:
    """Split the model, still on the meta device, over a 1-D mesh in place: parameters, hooks, `token_split`.

    Experts that expert parallelism has distributed already (`exchange`) stay as they are: each rank sends them its tokens.
    """
    names: dict[nn.Module, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):  # an expert's
                continue
            dim = split_dimension(f"{prefix}.{name}")
            make_dtensor(module, name, mesh, Replicate() if dim is None else Shard(dim))
            names.setdefault(module, []).append(name)
    view_locally(model, mesh, names)
    group = mesh.get_group()
    for layer in (*model.prelude, *model.core.layers, *model.coda):
        layer.register_forward_pre_hook(make_views)
    whole_experts = [each for each in find_mixtures(model) if each.exchange is not None]
    _exchange_tokens_around([each.shared for each in whole_experts if each.shared is not None], group)
    _split_embedding(model.embedding, group)
    model.token_split = TensorSplitTokens(group)


def _exchange_tokens_around(shared: list[SwiGLU], group: ProcessGroup) -> None:
    """Hook shared experts, split by channels beside experts that are whole, as `token_split` does for other parts.

    They get the mixture's flattened tokens, (tokens, channels). All have the same hooks, since compiled code is for one
    set of them.
    """

    def gather_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather_for_split_work(args[0], 0, group),)

    def scatter_output(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return reduce_scatter_with_grad(output, 0, group)

    for each in shared:
        each.register_forward_pre_hook(gather_input)
        each.register_forward_hook(scatter_output)


def _split_embedding(embedding: Embedding, group: ProcessGroup) -> None:
    """Hook the embedding, split by vocabulary, so that it returns the vectors of this rank's part of the tokens.

    Each rank looks up the ids of its part, zeros for the others; the sum over ranks is the embedding.
    """

    def localize_ids(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = embedding.weight.shape[0]
        own = args[0] - group.rank() * rows
        return own.clamp(0, rows - 1), (own < 0) | (own >= rows)

    embedding.register_forward_pre_hook(localize_ids)
    embedding.register_forward_hook(lambda module, args, output: reduce_scatter_with_grad(output, TOKENS, group))


class GroupVocabulary:
    """The ranks of a group, each with an equal part of the vocabulary; see `VocabularyShards` in the model."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tensors (...) of all ranks, stacked to (ranks, ...)."""
        return all_gather(x[None], 0, self.group)


class TensorSplitTokens(WholeTokens):
    """Each rank of a group has an equal run of the tokens in its residual stream, and an equal part of the vocabulary."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def gather_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Gather all local tokens (batch, tokens, dim), for some of the heads or channels."""
        return gather_for_split_work(x, TOKENS, self.group)

    def scatter_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Reduce-scatter the ranks' partial sums (batch, tokens, dim) over the tokens."""
        return reduce_scatter_with_grad(x, TOKENS, self.group)

    def residual_part(self, values: torch.Tensor) -> torch.Tensor:
        """Select this rank's run of the tokens from (..., local tokens)."""
        return values.chunk(self.group.size(), dim=-1)[self.group.rank()]

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of all ranks, 0-dimensional; backward, each rank differentiates its own summand."""
        return sum_with_own_grad(values.sum(), self.group)

    def gather_for_loss(
        self, features: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, GroupVocabulary]:
        """Gather features and weights of all local tokens; return them and the vocabulary that ranks split."""
        if weights is not None:
            weights = gather_for_same_work(weights, TOKENS, self.group)
        return gather_for_split_work(features, TOKENS, self.group), weights, GroupVocabulary(self.group)
