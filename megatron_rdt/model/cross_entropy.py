"""Cross entropy without the full logits: they exist for one chunk of tokens at a time, forward and backward.

The loss is a scalar, so its gradient with respect to the features and the output matrix is known in the forward pass up
to one factor. It is computed there, chunk by chunk, while the chunk's logits exist (as in Liger-Kernel,
arXiv:2410.10989); the backward pass only multiplies by the factor. No logits are kept and none are computed twice.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rdt.model.linear import add_product

# At most about this many logits in a chunk. A GPU reads and writes the output matrix and its gradient for each chunk, so
# chunks of few tokens leave it waiting for memory.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 22, 1 << 26


def count_chunk_tokens(vocabulary: float, gpu: bool) -> int:
    """Return the number of tokens in a chunk, at least 1, for so many entries of the vocabulary on this rank."""
    return max(int((GPU_CHUNK_ELEMENTS if gpu else CHUNK_ELEMENTS) // vocabulary), 1)


def apply_softcap(logits: Tensor, softcap: float) -> Tensor:
    """Return softcap * tanh(logits / softcap), or the logits where `softcap` is 0 (Gemma 2, arXiv:2408.00118)."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class VocabularyShards(Protocol):
    """Ranks that each hold an equal part of the vocabulary, in order of rank.

    Attributes:
        rank: of this process among them.
    """

    rank: int

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the tensors (...) of all ranks, stacked to (ranks, ...)."""


def _target_terms(
    logits: Tensor, target: Tensor, shards: VocabularyShards | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return per token the log-partition function, the target's logit and column, and a mask of targets on this rank.

    Args:
        logits: (tokens, vocabulary), or this rank's part of the vocabulary.
        target: (tokens,) ids.
        shards: the ranks that hold the other parts; None where this one has all.

    Returns:
        The two, then the target's column among these logits and a mask that is False where the target is another rank's;
        None for a mask of True.
    """
    partition = logits.logsumexp(-1)
    if shards is None:
        return partition, logits.gather(-1, target[:, None])[:, 0], target, None
    own = target - shards.rank * logits.shape[1]
    is_here, column = (own >= 0) & (own < logits.shape[1]), own.clamp(0, logits.shape[1] - 1)
    picked = logits.gather(-1, column[:, None])[:, 0] * is_here
    # One exchange of two numbers per token: log-sum-exps combine by log-sum-exp, and only one rank has the target's logit.
    partitions, pieces = shards.all_gather(torch.stack((partition, picked))).unbind(1)
    return partitions.logsumexp(0), pieces.sum(0), column, is_here


def _logit_gradient(
    logits: Tensor,
    partition: Tensor,
    column: Tensor,
    is_here: Tensor | None,
    weight: Tensor | None,
    softcap: float,
    z_weight: float,
) -> Tensor:
    """Return the gradient of a chunk's objective with respect to its logits before the soft cap, (tokens, vocabulary).

    d(entropy + z partition^2) / d logits = (1 + 2 z partition) softmax - one-hot, and the cap y = c tanh(x / c) has
    dy/dx = 1 - (y / c)^2.
    """
    grad = (logits - partition[:, None]).exp_()
    if z_weight:
        grad *= (1 + 2 * z_weight * partition)[:, None]
    rows = torch.arange(len(column), device=column.device)
    grad[rows, column] -= 1 if is_here is None else is_here.to(grad.dtype)
    if weight is not None:
        grad *= weight[:, None]
    if softcap:
        grad *= 1 - (logits / softcap).square()
    return grad


ScoreChunk = Callable[[Tensor, Tensor, Tensor | None, float, float], tuple[Tensor, Tensor, Tensor]]


def score_chunk(
    product: Tensor, target: Tensor, weight: Tensor | None, softcap: float, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return per token the log-partition function and the target's logit, and the gradient of `_logit_gradient`.

    The same as the two functions above for a whole vocabulary, written to be compiled: nothing is indexed, so that the
    product is read, and the gradient written, in its own dtype, and no logits in float32 are.

    Args:
        product: features times output matrix, (tokens, vocabulary), in the compute dtype.
        target: (tokens,) ids.
        weight, softcap, z_weight: see `cross_entropy`.

    Returns:
        (tokens,), (tokens,), float32 or wider, and (tokens, vocabulary) in the dtype of the product.
    """
    logits = apply_softcap(product.to(torch.promote_types(product.dtype, torch.float32)), softcap)
    partition = logits.logsumexp(-1)
    is_target = torch.arange(product.shape[1], device=product.device) == target[:, None]
    target_logit = torch.where(is_target, logits, 0.0).sum(-1)
    grad = (logits - partition[:, None]).exp()
    if z_weight:
        grad = grad * (1 + 2 * z_weight * partition)[:, None]
    grad = grad - is_target.to(grad.dtype)
    if weight is not None:
        grad = grad * weight[:, None]
    if softcap:
        grad = grad * (1 - (logits / softcap).square())
    return partition, target_logit, grad.to(product.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The three sums of `cross_entropy`; only the first carries gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        matrix: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float,
        z_weight: float,
        shards: VocabularyShards | None,
        score: ScoreChunk | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums objective, cross entropy and squared log-partition function; save the gradients."""
        # Products are in the dtype of the features; logits, sums and the matrix's gradient are float32 or wider.
        wide = torch.promote_types(features.dtype, torch.float32)
        rounded = matrix.to(features.dtype)
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        grad_features = torch.empty_like(features) if wanted[0] else None
        grad_matrix = torch.zeros_like(matrix) if wanted[1] else None
        grad_weights = torch.empty_like(weights) if wanted[2] and weights is not None else None
        entropy = torch.zeros((), dtype=wide, device=features.device)
        square = torch.zeros((), dtype=wide, device=features.device)
        size = count_chunk_tokens(matrix.shape[0], matrix.is_cuda)
        for start in range(0, len(features), size):
            rows = slice(start, start + size)
            part, target = features[rows], targets[rows]
            weight = None if weights is None else weights[rows]
            grad = None
            if score is not None:
                product = functional.linear(part, rounded)
                partition, target_logit, grad = score(product, target, weight, softcap, z_weight)
            else:
                logits = apply_softcap(functional.linear(part, rounded).to(wide), softcap)
                partition, target_logit, column, is_here = _target_terms(logits, target, shards)
            each = partition - target_logit
            entropy += each.sum() if weight is None else (each * weight).sum()
            square += partition.square().sum() if weight is None else (partition.square() * weight).sum()
            if grad_weights is not None:
                grad_weights[rows] = each + z_weight * partition.square()
            if grad_features is None and grad_matrix is None:
                continue
            if grad is None:
                grad = _logit_gradient(logits, partition, column, is_here, weight, softcap, z_weight).to(features.dtype)
            if grad_features is not None:
                grad_features[rows] = grad @ rounded
            if grad_matrix is not None:
                add_product(grad_matrix, grad.T, part)
        ctx.save_for_backward(grad_features, grad_matrix, grad_weights)
        ctx.mark_non_differentiable(entropy, square)
        return entropy + z_weight * square, entropy, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients of features, matrix and weights by the objective's; ignore the other two."""
        factor = grads[0]
        scaled = [None if saved is None else saved * factor.to(saved.dtype) for saved in ctx.saved_tensors]
        return scaled[0], scaled[1], None, scaled[2], None, None, None, None


def cross_entropy(
    features: Tensor,
    matrix: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    softcap: float = 0.0,
    z_weight: float = 0.0,
    shards: VocabularyShards | None = None,
    score: ScoreChunk | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three sums over tokens: objective (with gradient), cross entropy, squared log-partition function.

    Args:
        features: (..., dim), in the compute dtype.
        matrix: W, (vocabulary, dim), float32 or wider; rounded to the dtype of the features.
        targets: (...) token ids.
        weights: (...) factor of each token, float32 or wider; None means 1. It may carry gradient.
        softcap: see `apply_softcap`; 0 means none.
        z_weight: weight of the squared log-partition function (PaLM, arXiv:2204.02311).
        shards: the matrix is this rank's part of W. The sums are those of all of W; the gradient of the features is
            only this part's contribution.
        score: `score_chunk`, compiled, which scores the chunks where gradient is wanted and there are no shards.

    Returns:
        Three 0-dimensional sums over tokens, float32 or wider: the objective, entropy + z_weight * square, with
        gradient; the cross entropy; the squared log-partition function.
    """
    features, targets = features.flatten(0, -2), targets.flatten()
    weights = None if weights is None else weights.flatten()
    is_trained = torch.is_grad_enabled() and (features.requires_grad or matrix.requires_grad)
    score = score if is_trained and shards is None else None
    return _ChunkedCrossEntropy.apply(features, matrix, targets, weights, softcap, z_weight, shards, score)


@torch.no_grad()
def score_targets(
    features: Tensor, matrix: Tensor, targets: Tensor, *, softcap: float = 0.0, shards: VocabularyShards | None = None
) -> tuple[Tensor, Tensor]:
    """Return each token's cross entropy, and True where its target is not the likeliest id; (...) each, without gradient.

    Args:
        features, matrix, targets, softcap, shards: see `cross_entropy`.
    """
    shape, features, targets = targets.shape, features.flatten(0, -2), targets.flatten()
    wide, rounded = torch.promote_types(features.dtype, torch.float32), matrix.to(features.dtype)
    losses, misses = [], []
    size = count_chunk_tokens(matrix.shape[0], matrix.is_cuda)
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        logits = apply_softcap(functional.linear(features[rows], rounded).to(wide), softcap)
        partition, target_logit, column, is_here = _target_terms(logits, targets[rows], shards)
        largest, likeliest = logits.max(-1)
        is_likeliest = likeliest == column
        if shards is not None:
            assert is_here is not None
            # The rank with the largest logit decides whether it is the target's; among equal ones the first, as argmax.
            found = torch.stack((largest, (is_likeliest & is_here).to(wide)))
            of_ranks = shards.all_gather(found)  # (ranks, 2, tokens)
            is_likeliest = of_ranks[:, 1].gather(0, of_ranks[:, 0].argmax(0, keepdim=True))[0] > 0
        losses.append(partition - target_logit)
        misses.append(~is_likeliest | ~partition.isfinite())  # argmax of NaN is an id too
    return torch.cat(losses).view(shape), torch.cat(misses).view(shape)
