"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): each process has some of the heads, channels, vocabulary.

Between attention and feed-forward a process holds some of the tokens instead, so the residual stream, the recurrent state,
all norms and the injection are split too (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198):

    part of the tokens -> gather -> attention or feed-forward with part of the heads or channels -> sum, scatter -> ...

The embedding and the output matrix are split by vocabulary. Logits stay split: their cross entropy takes one exchange of
two numbers per token. SPLIT_DIMENSIONS lists the split parameters and
their dimensions; every other parameter is whole on every rank.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.cross_entropy import cross_entropy
from megatron_rdt.model.initial_state import normal_state
from megatron_rdt.model.rdt import Embedding
from megatron_rdt.parallel.autograd_collectives import gather, gather_for_same, gathered, scatter_sum, whole_sum
from megatron_rdt.parallel.dtensor_views import place, view_locally

TOKENS = 1  # the dimension of activations (batch, sequence, channels) that is split between the parts

# How a parameter's name ends, and the dimension that is split.
SPLIT_DIMENSIONS: list[tuple[str, int]] = [
    (r"(^|\.)(embedding|head)\.weight", 0),
    # Grouped-query: by heads.
    (r"attention\.(query|key|value)\.weight", 0),
    (r"attention\.(query|key)_bias", 0),
    (r"attention\.token_values\.weight", 1),
    (r"attention\.token_values\.gate\.weight", 0),
    # Latent: what leads up to the heads; the latents themselves every process computes whole.
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
    """The dimension along which the parameter `name` is split, None where it is not."""
    return next((dim for pattern, dim in SPLIT_DIMENSIONS if re.search(pattern + "$", name)), None)


def parallelize(model: RecurrentDepthTransformer, mesh: DeviceMesh) -> None:
    """Split the model, on the meta device and not yet sharded, over a 1-D mesh, in place.

    Experts that are shared out already (`exchange`) stay as they are, and get some of the tokens from each process.
    """
    names: dict[nn.Module, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):  # an expert's
                continue
            dim = split_dimension(f"{prefix}.{name}")
            place(module, name, mesh, Replicate() if dim is None else Shard(dim))
            names.setdefault(module, []).append(name)
    view_locally(model, mesh, names)
    group = mesh.get_group()
    for layer in (*model.prelude, *model.core.layers, *model.coda):
        _split_tokens_around(layer.attention, TOKENS, group)
        if getattr(layer.feedforward, "exchange", None) is None:
            _split_tokens_around(layer.feedforward, TOKENS, group)
        elif layer.feedforward.shared is not None:
            _split_tokens_around(layer.feedforward.shared, 0, group)
    _split_embedding(model.embedding, group)
    model.normal_state = partial(_own_noise, group)
    model.cross_entropy = partial(_split_cross_entropy, group)
    model.token_sum = partial(_whole_token_sum, group)
    model.own_tokens = partial(_own_tokens, group)


def _split_tokens_around(part: nn.Module, dim: int, group: ProcessGroup) -> None:
    """Let a part, which needs all tokens and gives a partial sum, take and give some of the tokens, along `dim`."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather(args[0], dim, group), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return scatter_sum(output, dim, group)

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after)


def _split_embedding(embedding: Embedding, group: ProcessGroup) -> None:
    """Let the table, of some of the vocabulary, give the vectors of some of the tokens."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = embedding.weight.shape[0]
        own = args[0] - group.rank() * rows
        return own.clamp(0, rows - 1), (own < 0) | (own >= rows)

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return scatter_sum(output, TOKENS, group)

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)


def _own_noise(group: ProcessGroup, seeds: tuple[int, ...], positions: torch.Tensor, *options: Any) -> torch.Tensor:
    """`normal_state` at this process's part of the positions."""
    return normal_state(seeds, _own_tokens(group, positions), *options)


def _own_tokens(group: ProcessGroup, values: torch.Tensor) -> torch.Tensor:
    """This process's part of the tokens of a tensor (..., sequence)."""
    return values.chunk(group.size(), dim=-1)[group.rank()]


class VocabularyShards:
    """See `megatron_rdt.model.cross_entropy.Shards`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.place = group.rank()

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """(...) of each process -> (processes, ...)."""
        return gathered(x[None], 0, self.group)


def _split_cross_entropy(
    group: ProcessGroup, features: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cross_entropy` of all tokens from the features of some, with some rows of the output matrix."""
    if options.get("weights") is not None:
        options["weights"] = gather_for_same(options["weights"], TOKENS, group)
    features = gather(features, TOKENS, group)
    return cross_entropy(features, matrix, targets, shards=VocabularyShards(group), **options)


def _whole_token_sum(group: ProcessGroup, values: torch.Tensor) -> torch.Tensor:
    """The sum over all tokens, of which this process has some."""
    return whole_sum(values.sum(), group)
