"""Mixture of experts for the core's layers: routed and shared SwiGLU experts, no token dropped.

    s = softmax(W x)                        float32
    chosen = top-k of W x + selection bias
    y = sum over chosen of s_i / sum(s) * expert_i(x) + shared(x)

The selection bias decides which experts are chosen and nothing else, so balancing costs the loss nothing (Wang et al.
2024, arXiv:2408.15664): after each optimizer step it moves up for experts with less than the mean load of all ranks, down
for those with more. Tokens are sorted by expert, so an expert's products run on one contiguous piece: in bfloat16 on a GPU
all experts in one grouped product, elsewhere one after the other.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.feedforward import SwiGLU
from megatron_rdt.model.linear import linear

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


class _GroupedLinear(torch.autograd.Function):
    """y = x W_i^T for the rows x of expert i, with W rounded to the dtype of x; keeps the same as `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor | None, ends: Tensor) -> Tensor:
        """Return the products (rows, out) in the dtype of x; save x and the matrices."""
        ctx.save_for_backward(x, weight if rounded is None else rounded, ends)
        ctx.weight_dtype = weight.dtype
        return functional.grouped_mm(x, (weight.to(x.dtype) if rounded is None else rounded).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and W, the latter in the dtype of W."""
        grad = grads[0].contiguous()
        x, matrices, ends = ctx.saved_tensors
        grad_x = functional.grouped_mm(grad, matrices.to(grad.dtype), offs=ends)
        grad_weight = functional.grouped_mm(grad.T, x, offs=ends)
        if not _writes_idle_groups(grad.device):
            grad_weight.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
        return grad_x, grad_weight.to(ctx.weight_dtype), None, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, rounded: Tensor | None = None) -> Tensor:
    """Multiply rows (rows, in), sorted by expert, each with its expert's matrix of (experts, out, in) transposed.

    Args:
        x: the rows; `in` and `out` must be multiples of 16 bytes.
        weight: rounded to the dtype of `x`, unless `rounded` is that already.
        ends: (experts,) int32, the index after the last row of each expert.
        rounded: the matrices in the dtype of `x`, where there are some already.
    """
    return _GroupedLinear.apply(x.contiguous(), weight, rounded, ends)


def scatter_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return a permutation with row r of `x` at row indices[r].

    Not an indexed read, whose backward pass adds rows up in no fixed order.
    """
    return torch.empty_like(x).index_copy(0, indices, x)


class MixtureOfExperts(nn.Module):
    """Routed experts, of which each token takes a few, and shared ones, which every token takes.

    All shared experts together are one SwiGLU as wide as all of them: the sum is the same.

    Attributes:
        selection_bias: (experts,) buffer, float32; the same on every rank.
        routing_sums: (experts + 1,) float64, sums over this rank's tokens since the last `rebalance`: the number of tokens
            sent to each expert, and the entropy of the routing distribution in nats. A token counts once per iteration.
            None where nothing was counted.
        exchange: runs the experts where several ranks hold them; None where this one holds all.
        rounded: within `use_rounded`, the experts' matrices in the compute dtype.
    """

    MULTIPLIED: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
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
        self.rounded: dict[str, Tensor] = {}

    def reset_buffers(self) -> None:
        """Set the selection bias to zero and drop the routing counts, as at the start of a run."""
        self.selection_bias.zero_()
        self.routing_sums = None

    def forward(self, x: Tensor) -> Tensor:
        """Return weighted plus shared experts' outputs, (batch, sequence, dim); in training count the routing."""
        flat = x.flatten(0, -2)
        logits = linear(flat.to(self.router.dtype), self.router)  # (tokens, experts)
        scores = logits.softmax(-1)
        # The bias enters the choice only. The weights come from unbiased scores, so no gradient pays for the balance.
        indices = (logits.detach() + self.selection_bias).topk(self.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        # Each token becomes `experts_per_token` consecutive rows; `order` lists these rows by expert.
        expert_of_row, order = indices.flatten().sort(stable=True)
        ends = torch.searchsorted(expert_of_row, torch.arange(self.experts, device=x.device), right=True)
        if self.training and not _is_recomputing():  # a recomputed iteration was counted when it first ran
            self._count_routing(ends, scores.detach())
        rows = flat.unsqueeze(1).expand(-1, self.experts_per_token, -1).flatten(0, 1)
        rows = scatter_rows(rows, order.argsort())
        run = self._run_experts
        outputs = run(rows, ends) if self.exchange is None else self.exchange(run, rows, ends)
        outputs = scatter_rows(outputs, order).unflatten(0, (-1, self.experts_per_token))
        mixed = (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(1)
        if self.shared is not None:
            mixed = mixed + self.shared(flat)
        return mixed.view(x.shape)

    @torch.no_grad()
    def _count_routing(self, ends: Tensor, scores: Tensor) -> None:
        """Add the load of each expert and the entropy of the scores to `routing_sums`."""
        entropy = torch.special.entr(scores).sum().double()
        new = torch.cat((ends.diff(prepend=ends.new_zeros(1)).double(), entropy[None]))
        self.routing_sums = new if self.routing_sums is None else self.routing_sums + new

    def _run_experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return this rank's experts' outputs for the sorted rows; those of expert i end before row ends[i]."""
        is_aligned = all(size % GROUPED_MULTIPLE == 0 for size in self.gate.shape[1:])
        if rows.is_cuda and rows.dtype == torch.bfloat16 and is_aligned:
            return self._run_experts_grouped(rows, ends.int())
        outputs = []
        # split and unbind, not slices and indexing: their backward passes put all pieces together once.
        pieces = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        for piece, gate, up, down in zip(pieces, *map(self._list_matrices, self.MULTIPLIED)):
            outputs.append(linear(functional.silu(linear(piece, *gate)) * linear(piece, *up), *down))
        return torch.cat(outputs)

    def _list_matrices(self, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """List each expert's matrix of that name, and the rounded one or None."""
        matrices = getattr(self, name).unbind()
        return list(zip(matrices, self.rounded[name].unbind() if self.rounded else [None] * len(matrices)))

    def _run_experts_grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the same as `_run_experts`, from three grouped products over all experts of this rank."""
        rounded = self.rounded.get
        gate = grouped_linear(rows, self.gate, ends, rounded("gate"))
        up = grouped_linear(rows, self.up, ends, rounded("up"))
        return grouped_linear(functional.silu(gate) * up, self.down, ends, rounded("down"))


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
