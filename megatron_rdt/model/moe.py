"""Mixture of experts for the core's layers: routed and shared SwiGLU experts, no token dropped.

    s = softmax(W x)                        float32
    chosen = top-k of W x + selection bias
    y = sum over chosen of s_i / sum(s) * expert_i(x) + shared(x)

The selection bias decides who is chosen and nothing else, so balancing costs the loss nothing (Wang et al. 2024,
arXiv:2408.15664): after each optimizer step it moves up for experts with less than the mean load of all ranks, down for
those with more. Tokens are sorted by expert, so an expert's products run on one contiguous piece.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.feedforward import SwiGLU, ffn_width
from megatron_rdt.model.linear import linear

EXPERT_MULTIPLE = 16


def expert_width(config: ModelConfig) -> int:
    """Inner width of a routed expert."""
    if config.expert_dim:
        return config.expert_dim
    return -(-ffn_width(config) // (config.experts_per_token * EXPERT_MULTIPLE)) * EXPERT_MULTIPLE


def _in_backward() -> bool:
    """Whether activation checkpointing is running this forward pass again."""
    return torch._C._current_graph_task_id() != -1


class MixtureOfExperts(nn.Module):
    """Routed experts, of which each token takes a few, and shared ones, which every token takes.

    All shared experts together are one SwiGLU as wide as all of them: the sum is the same.

    Attributes:
        selection_bias: (experts,) buffer, float32; the same on every rank.
        load: (experts,) tokens that each was sent since the last `rebalance`, on this rank.
        entropy: of the routing distribution, summed over the tokens counted in `load`, in nats.
    """

    INITIAL_VALUES: ClassVar[dict[str, float]] = {}
    selection_bias: torch.Tensor
    load: torch.Tensor
    entropy: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.chosen, width = config.experts, config.experts_per_token, expert_width(config)
        self.router = nn.Parameter(torch.empty(config.experts, config.dim))
        self.gate = nn.Parameter(torch.empty(config.experts, width, config.dim))
        self.up = nn.Parameter(torch.empty(config.experts, width, config.dim))
        self.down = nn.Parameter(torch.empty(config.experts, config.dim, width))
        shared = config.shared_experts * (config.shared_expert_dim or width)
        self.shared = SwiGLU(config, shared) if shared else None
        self.register_buffer("selection_bias", torch.empty(config.experts))
        self.register_buffer("load", torch.empty(config.experts), persistent=False)
        self.register_buffer("entropy", torch.empty(()), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """The values at the start of a run; on the meta device nothing happens."""
        for buffer in (self.selection_bias, self.load, self.entropy):
            buffer.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, dim) -> the same, in the dtype of `x`."""
        flat = x.flatten(0, -2)
        logits = linear(flat.to(self.router.dtype), self.router)  # (tokens, experts)
        scores = logits.softmax(-1)
        indices = (logits.detach() + self.selection_bias).topk(self.chosen, dim=-1).indices
        weights = scores.gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(indices.flatten(), minlength=self.experts)
        if self.training and not _in_backward():
            self.load += counts
            self.entropy += torch.special.entr(scores.detach()).sum()
        # Rows by expert; row r of `flat` stands `chosen` times.
        order = indices.flatten().argsort(stable=True)
        rows = flat.repeat_interleave(self.chosen, dim=0)[order]
        outputs = self._experts(rows, counts)
        outputs = torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, (-1, self.chosen))
        mixed = (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(1)
        if self.shared is not None:
            mixed = mixed + self.shared(flat)
        return mixed.view(x.shape)

    def _experts(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Each expert on its piece of the sorted rows."""
        pieces = rows.split(counts.tolist())
        outputs = []
        # unbind, not indexing: its backward pass stacks the experts' gradients once.
        for piece, gate, up, down in zip(pieces, self.gate.unbind(), self.up.unbind(), self.down.unbind()):
            hidden = functional.silu(linear(piece, gate)) * linear(piece, up)
            outputs.append(linear(hidden, down))
        return torch.cat(outputs)


@torch.no_grad()
def rebalance(model: nn.Module, rate: float, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float] | None:
    """Move every selection bias by `rate` towards an even load, and start counting anew.

    Args:
        model: any module that holds mixtures.
        rate: step of the bias.
        reduce: sums a tensor over all ranks.

    Returns:
        {"expert_load_max": largest load over the mean, over all mixtures; "expert_idle": share of experts without a
        token; "routing_entropy": mean entropy of the routing distribution in nats}; None where there is no mixture.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures:
        return None
    counted = torch.stack([torch.cat((mixture.load, mixture.entropy[None])) for mixture in mixtures])
    counted = reduce(counted)
    load, entropy = counted[:, :-1], counted[:, -1]
    mean = load.mean(-1, keepdim=True)
    for mixture, own, average in zip(mixtures, load, mean):
        mixture.selection_bias += rate * torch.sign(average - own)
        mixture.load.zero_()
        mixture.entropy.zero_()
    tokens = load.sum() / mixtures[0].chosen
    return {
        "expert_load_max": float((load / mean.clamp_min(1)).max()),
        "expert_idle": float((load == 0).float().mean()),
        "routing_entropy": float(entropy.sum() / tokens.clamp_min(1)),
    }
