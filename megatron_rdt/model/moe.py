"""Mixture of experts for the core's layers: routed and shared SwiGLU experts, no token dropped.

    s = softmax(W x)                        float32
    chosen = top-k of W x + selection bias
    y = sum over chosen of s_i / sum(s) * expert_i(x) + shared(x)

The selection bias decides which experts are chosen and nothing else, so balancing costs the loss nothing (Wang et al.
2024, arXiv:2408.15664): after each optimizer step it moves up for experts with less than the mean load of all ranks, down
for those with more. Tokens are sorted by expert, so an expert's products run on one contiguous piece: in bfloat16 on a GPU
all experts in one grouped product, elsewhere one after the other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.feedforward import SwiGLU, gated_silu
from megatron_rdt.model.linear import GradientSum, RoundedMatrix, linear

# Grouped products read rows in pieces of 16 bytes, 8 numbers of bfloat16.
GROUPED_MULTIPLE = 8


RunExperts = Callable[[Tensor, Tensor], Tensor]
"""(rows sorted by expert, index after the last row of each expert) -> the experts' outputs, in the same order."""
RowExchange = Callable[[RunExperts, Tensor, Tensor], Tensor]
"""Calls a `RunExperts` on the ranks that hold the experts; its further arguments and result are those of `RunExperts`."""


def _is_recomputing() -> bool:
    """Return True if activation checkpointing is running this forward pass again, inside the backward pass."""
    return torch._C._current_graph_task_id() != -1


def _writes_idle_groups(device: torch.device) -> bool:
    """Return True if a grouped product on `device` writes the zeros of groups without rows.

    Blackwell's leaves their memory as it was, which may be NaN (github.com/pytorch/pytorch/issues/172439).
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)


def _multiply_groups(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return grad^T x of each expert's rows, (experts, out, in), in the dtype of x; zeros of experts without rows."""
    product = functional.grouped_mm(grad.T, x, offs=ends)
    if not _writes_idle_groups(grad.device):
        product.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    return product


class ExpertGradients(GradientSum):
    """Gradients of the experts' matrices over the iterations of a pass, from as few grouped products as memory allows.

    A grouped product writes bfloat16, so each would be written, read and added to a float32 total that is many times larger
    than the rows. Instead the rows of all iterations wait until the end, where one product per matrix multiplies them. By then
    nothing else of an iteration is kept, so the peak of memory does not move, unless iterations are recomputed (not `waits`).

    Attributes:
        pending: (gradients, inputs, ends) of the products whose gradients are not in the total yet.
        most_pending: number of them at which they are added.
    """

    def __init__(self, weight: Tensor, waits: bool) -> None:
        self.total: Tensor | None = None
        self.dtype, self.most_pending = weight.dtype, math.inf if waits else 1
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, grad: Tensor, x: Tensor, ends: Tensor) -> None:
        """Add grad^T x of each expert's rows, at once or later."""
        self.pending.append((grad, x, ends))
        if len(self.pending) >= self.most_pending:
            self._multiply_pending()

    def hand_over(self) -> Tensor:
        """Return the sum and forget it."""
        if self.pending:
            self._multiply_pending()
        return super().hand_over()

    def _multiply_pending(self) -> None:
        """Add the gradients of the pending rows to the total."""
        grads, inputs, ends = zip(*self.pending)
        self.pending = []
        indices, merged_ends = merge_groups(ends, [len(x) for x in inputs])
        grad, x = merge_rows(grads, indices), merge_rows(inputs, indices)
        product = _multiply_groups(grad, x, merged_ends)
        self.total = product.to(self.dtype) if self.total is None else self.total.add_(product)


def merge_groups(ends: Sequence[Tensor], rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Say how rows that are sorted by expert in several tensors are sorted by expert in one.

    Args:
        ends: of each tensor, (experts,), the index after the last row of each expert.
        rows: number of rows of each tensor.

    Returns:
        For each tensor the index of each of its rows in the merged one; the ends of that, int32.
    """
    if len(ends) == 1:
        return [torch.arange(rows[0], device=ends[0].device)], ends[0].int()
    last = torch.stack(list(ends)).long()  # (tensors, experts)
    counts = last.diff(dim=1, prepend=last.new_zeros(len(last), 1))
    sums = counts.sum(0)
    merged = sums.cumsum(0)
    # An expert's rows of the first tensor come first, then those of the second ...
    shifts = (merged - sums) + (counts.cumsum(0) - counts) - (last - counts)
    indices = []
    for own_ends, shift, number in zip(last, shifts, rows):
        row = torch.arange(number, device=last.device)
        indices.append(row + shift[torch.searchsorted(own_ends, row, right=True)])
    return indices, merged.int()


def merge_rows(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Return one tensor with each part's rows at its indices."""
    if len(parts) == 1:
        return parts[0]
    merged = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for part, index in zip(parts, indices):
        merged.index_copy_(0, index, part)
    return merged


class _GroupedLinear(torch.autograd.Function):
    """y = x W_i^T for the rows x of expert i, with W rounded to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: RoundedMatrix | None, ends: Tensor) -> Tensor:
        """Return the products (rows, out) in the dtype of x; save x and the matrices, which are unrounded without `rounded`.

        `weight` is the rounded matrices' anchor where they have one.
        """
        matrices = weight if rounded is None else rounded.matrix
        ctx.save_for_backward(x, matrices, ends)
        ctx.sum, ctx.weight_dtype = None if rounded is None else rounded.sum, weight.dtype
        return functional.grouped_mm(x, matrices.to(x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and W, the latter in the dtype of W; None for W if it is added to a sum."""
        grad = grads[0].contiguous()
        x, matrices, ends = ctx.saved_tensors
        grad_x = functional.grouped_mm(grad, matrices.to(grad.dtype), offs=ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        if ctx.sum is not None:
            ctx.sum.add(grad, x, ends)
            return grad_x, None, None, None
        return grad_x, _multiply_groups(grad, x, ends).to(ctx.weight_dtype), None, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, rounded: RoundedMatrix | None = None) -> Tensor:
    """Multiply rows (rows, in), sorted by expert, each with its expert's matrix of (experts, out, in) transposed.

    Args:
        x: the rows; `in` and `out` must be multiples of 16 bytes.
        weight: rounded to the dtype of `x`, unless `rounded` is that already.
        ends: (experts,) int32, the index after the last row of each expert.
        rounded: the matrices in the dtype of `x`, where there are some already.
    """
    if rounded is not None:
        weight = rounded.place(weight) if rounded.anchor is None else rounded.anchor
    return _GroupedLinear.apply(x.contiguous(), weight, rounded, ends)


class _SendTokens(torch.autograd.Function):
    """Rows sorted by expert, from tokens of which each becomes several rows.

    Forward and backward passes both read by index: that of an indexed read would add rows up in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """Return the rows (tokens * copies, dim) of the tokens (tokens, dim)."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the sum of each token's rows."""
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _MixOutputs(torch.autograd.Function):
    """The weighted sum of each token's rows, from rows sorted by expert."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return (tokens, dim) from outputs (rows, dim) and weights (tokens, rows of each)."""
        ctx.save_for_backward(outputs, weights, order, inverse)
        return (outputs[inverse].unflatten(0, weights.shape) * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of outputs and weights."""
        (grad,) = grads
        outputs, weights, order, inverse = ctx.saved_tensors
        grad_outputs = grad[order // weights.shape[1]] * weights.flatten()[order].unsqueeze(-1)
        grad_weights = (outputs[inverse].unflatten(0, weights.shape) * grad.unsqueeze(1)).sum(-1)
        return grad_outputs, grad_weights, None, None


class MixtureOfExperts(nn.Module):
    """Routed experts, of which each token takes a few, and shared ones, which every token takes.

    All shared experts together are one SwiGLU as wide as all of them: the sum is the same.

    Attributes:
        selection_bias: (experts,) buffer, float32; the same on every rank.
        routing_sums: (experts + 1,) float64, sums over this rank's tokens since the last `rebalance`: the number of tokens
            sent to each expert, and the entropy of the routing distribution in nats. A token counts once per iteration.
            None where nothing was counted.
        exchange: runs the experts where several ranks hold them; None where this one holds all.
        activate: `gated_silu`, compiled or not.
        rounded: within `use_rounded`, the experts' matrices in the compute dtype.
    """

    MULTIPLIED: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
    SUM = ExpertGradients
    selection_bias: Tensor
    routing_sums: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.experts_per_token, width = config.experts, config.experts_per_token, config.expert_width
        self.router = nn.Parameter(torch.empty(config.experts, config.dim))
        self.gate = nn.Parameter(torch.empty(config.experts, width, config.dim))
        self.up = nn.Parameter(torch.empty(config.experts, width, config.dim))
        self.down = nn.Parameter(torch.empty(config.experts, config.dim, width))
        self.shared = SwiGLU(config, config.shared_width) if config.shared_width else None
        self.register_buffer("selection_bias", torch.zeros(config.experts))
        # Not a buffer: it is neither saved nor sharded, and no conversion of the model may round it.
        self.routing_sums = None
        self.exchange: RowExchange | None = None
        self.activate: Callable[[Tensor, Tensor], Tensor] = gated_silu
        self.rounded: dict[str, RoundedMatrix] = {}

    def reset_buffers(self) -> None:
        """Set the selection bias to zero and drop the routing counts, as at the start of a run."""
        self.selection_bias.zero_()
        self.routing_sums = None

    def forward(self, x: Tensor) -> Tensor:
        """Return weighted plus shared experts' outputs, (batch, sequence, dim); in training count the routing."""
        return self.mix(x, *self.run_experts(x, self.score(x)))

    def score(self, x: Tensor) -> Tensor:
        """Return the router's logits, (batch, sequence, experts), in the dtype of the router."""
        return linear(x.to(self.router.dtype), self.router)

    def run_experts(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose experts by the logits and run them; return what `mix` takes beside `x`.

        Returns:
            The outputs (rows, dim), sorted by expert; their weights (tokens, experts_per_token); the row of each output,
            and the output of each row, where rows are `experts_per_token` for each token.
        """
        flat, logits = x.flatten(0, -2), logits.flatten(0, -2)
        scores = logits.softmax(-1)
        # The bias enters the choice only. The weights come from unbiased scores, so no gradient pays for the balance.
        indices = (logits.detach() + self.selection_bias).topk(self.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        expert_of_row, order = indices.flatten().sort(stable=True)
        ends = torch.searchsorted(expert_of_row, torch.arange(self.experts, device=x.device), right=True)
        if self.training and not _is_recomputing():  # a recomputed iteration was counted when it first ran
            self._count_routing(ends, scores.detach())
        inverse = order.argsort()
        rows = _SendTokens.apply(flat, order, inverse, self.experts_per_token)
        run = self._run_sorted_rows
        outputs = run(rows, ends) if self.exchange is None else self.exchange(run, rows, ends)
        return outputs, weights, order, inverse

    def mix(self, x: Tensor, outputs: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return the experts' outputs times their weights plus those of the shared experts, in the shape of `x`."""
        mixed = _MixOutputs.apply(outputs, weights.to(outputs.dtype), order, inverse)
        if self.shared is not None:
            mixed = mixed + self.shared(x.flatten(0, -2))
        return mixed.view(x.shape)

    @torch.no_grad()
    def _count_routing(self, ends: Tensor, scores: Tensor) -> None:
        """Add the load of each expert and the entropy of the scores to `routing_sums`."""
        entropy = torch.special.entr(scores).sum().double()
        new = torch.cat((ends.diff(prepend=ends.new_zeros(1)).double(), entropy[None]))
        self.routing_sums = new if self.routing_sums is None else self.routing_sums + new

    def _run_sorted_rows(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return this rank's experts' outputs for the sorted rows; those of expert i end before row ends[i]."""
        is_aligned = all(size % GROUPED_MULTIPLE == 0 for size in self.gate.shape[1:])
        if rows.is_cuda and rows.dtype == torch.bfloat16 and is_aligned:
            return self._run_experts_grouped(rows, ends.int())
        outputs = []
        # split and unbind, not slices and indexing: their backward passes put all pieces together once.
        pieces = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        for piece, gate, up, down in zip(pieces, *map(self._list_matrices, self.MULTIPLIED)):
            outputs.append(linear(gated_silu(linear(piece, *gate), linear(piece, *up)), *down))
        return torch.cat(outputs)

    def _list_matrices(self, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """List each expert's matrix of that name, and the rounded one or None."""
        weights, rounded = getattr(self, name), self.rounded.get(name)
        if rounded is None:
            return [(weight, None) for weight in weights.unbind()]
        return list(zip(rounded.place(weights).unbind(), rounded.matrix.unbind()))

    def _run_experts_grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the same as `_run_sorted_rows`, from three grouped products over all experts of this rank."""
        rounded = self.rounded.get
        gate = grouped_linear(rows, self.gate, ends, rounded("gate"))
        up = grouped_linear(rows, self.up, ends, rounded("up"))
        return grouped_linear(self.activate(gate, up), self.down, ends, rounded("down"))


@torch.no_grad()
def rebalance(model: nn.Module, rate: float | Tensor, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor] | None:
    """Move every selection bias by `rate` towards an even load, reset the counts, and return load and entropy by name.

    Args:
        model: any module that holds mixtures.
        rate: step of the bias; 0 where the optimizer step was discarded, since the counts may then come from a state that
            is not finite.
        reduce: sums a tensor over all ranks.

    Returns:
        {"expert_load_max": largest load over the mean, over all mixtures; "expert_idle": share of experts without a
        token; "routing_entropy": mean entropy of the routing distribution in nats}, 0-dimensional tensors, float64, on
        the device; None where there is no mixture.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures:
        return None
    nothing = torch.zeros(mixtures[0].experts + 1, dtype=torch.float64, device=mixtures[0].selection_bias.device)
    # One reduction for all mixtures; a rank that counted nothing takes part with zeros.
    sums = reduce(torch.stack([nothing if m.routing_sums is None else m.routing_sums for m in mixtures]))
    load, entropy = sums[:, :-1], sums[:, -1]
    mean = load.mean(-1, keepdim=True)
    for mixture, own, average in zip(mixtures, load, mean):
        # The sign, not the difference: the step does not depend on the batch size.
        mixture.selection_bias += rate * torch.sign(average - own)
        mixture.routing_sums = None
    tokens = load.sum() / mixtures[0].experts_per_token
    return {
        "expert_load_max": (load / mean.clamp_min(1)).max(),
        "expert_idle": (load == 0).double().mean(),
        "routing_entropy": entropy.sum() / tokens.clamp_min(1),
    }
