"""Muon: the momentum of a matrix, made orthogonal, is its update (Jordan 2024, kellerjordan.github.io/posts/muon).

    M = m M + (1 - m) G                     G the gradient, m `momentum`
    D = m M + (1 - m) G                     where `nesterov`, otherwise D = M
    O = U V^T of D = U S V^T                by `orthogonalize`
    W = (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

The factor gives every update a root mean square of 0.2, about that of AdamW, so AdamW's learning rate and weight decay
carry over (Liu et al. 2025, arXiv:2502.16982).

An update needs the whole matrix. Matrices that FSDP2 has split by rows are stepped n at a time on n ranks: each rank
gathers one of them, makes it orthogonal, and scatters its rows back. So each is computed once, and no rank ever holds
more than one whole matrix. Experts, (experts, rows, columns), are split between matrices, so each rank has whole ones.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from megatron_rdt.parallel.dtensor_views import local_shard
from megatron_rdt.parallel.rounded_adamw import restore_state_dtype, scaled_gradient

# Coefficients of Jordan's quintic: steepest at 0, where small singular values are.
QUINTIC = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2
EPS = 1e-7

Job = tuple[torch.Tensor, dict[str, Any]]
"""A parameter and the group that it is in."""


def orthogonalize(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """Return about U V^T of each matrix U S V^T in (..., rows, columns), by Newton-Schulz steps in its dtype.

    After 5 steps singular values lie between 0.68 and 1.21, except those that were below 0.0015 of the matrix's norm.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]  # the smaller of the two Gram matrices is computed
    x = matrices.mT if tall else matrices
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (norm + EPS).to(x.dtype)
    a, b, c = QUINTIC
    # Each step applies the odd polynomial a s + b s^3 + c s^5 to every singular value s, through products alone.
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


def _is_split_by_rows(parameter: torch.Tensor) -> bool:
    """Return True for a matrix split over several ranks; False for experts, which are split between matrices."""
    return isinstance(parameter, DTensor) and parameter.dim() == 2 and _shard_group(parameter).size() > 1


def _shard_group(parameter: DTensor) -> ProcessGroup:
    """Return the ranks that share the matrix's rows: the last axis of its mesh; one before it holds replicas."""
    mesh = parameter.device_mesh
    return mesh.get_group(mesh.ndim - 1)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and batches of matrices, whole or split along their first dimension by FSDP2.

    As in torch's own optimizers, a step divides gradients by the attribute `grad_scale`, and changes nothing if `found_inf` is
    not 0, where these are set; both are 0-dimensional and on the device.

    Args:
        params: parameters or groups; a group's options override the ones here.
        lr: learning rate.
        momentum: decay of the running mean of gradients.
        nesterov: look one step ahead.
        ns_steps: Newton-Schulz steps.
        weight_decay: decoupled.
        state_dtype: of the momentum between steps; rounded to the nearest, it moves by a twentieth of what it lacks.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._state_dtype = state_dtype
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, {**options, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, with a momentum of either dtype."""
        super().load_state_dict(state_dict)
        restore_state_dtype(self, ("momentum",), self._state_dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update each parameter with a gradient, unless `found_inf` is nonzero; every rank must call this."""
        jobs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        split = [job for job in jobs if _is_split_by_rows(job[0])]
        for parameter, group in jobs:
            if not _is_split_by_rows(parameter):
                # A rank without experts has an empty shard; its momentum is created all the same, for checkpoints.
                direction = self._advance_momentum(parameter, group)
                if direction.numel():
                    self._apply_update(parameter, group, orthogonalize(direction, group["ns_steps"]))
        # Sorted by size, the matrices that ranks work on at the same time are of about the same size.
        split.sort(key=lambda job: job[0].numel(), reverse=True)
        while split:
            ranks = _shard_group(split[0][0]).size()
            self._step_split_matrices(split[:ranks])
            del split[:ranks]

    def _advance_momentum(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Advance the momentum and return D, this rank's shard of the matrix to make orthogonal; bfloat16 on a GPU."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=self._state_dtype)
        gradient, momentum = scaled_gradient(self, parameter), local_shard(state["momentum"])
        advanced = momentum.to(gradient.dtype).lerp(gradient, 1 - group["momentum"])
        self._write_unless_skipped(momentum, advanced)
        direction = gradient.lerp(advanced, group["momentum"]) if group["nesterov"] else advanced
        return direction.bfloat16() if direction.is_cuda else direction

    def _apply_update(self, parameter: torch.Tensor, group: dict[str, Any], update: torch.Tensor) -> None:
        """Decay this rank's shard of the weights and subtract `update`, its orthogonal rows, scaled by lr."""
        shard, lr = local_shard(parameter), group["lr"]
        decayed = shard * (1 - lr * group["weight_decay"])
        scale = -lr * UPDATE_RMS * math.sqrt(max(parameter.shape[-2:]))
        self._write_unless_skipped(shard, decayed.add_(update, alpha=scale))

    def _write_unless_skipped(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Write `new` into `old` unless `found_inf` skips the step; decided on the device, so the host does not wait."""
        found_inf = getattr(self, "found_inf", None)
        old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))

    def _step_split_matrices(self, jobs: list[Job]) -> None:
        """Step matrices that are split by rows, at most as many as there are ranks; rank i orthogonalizes the i-th."""
        process_group = _shard_group(jobs[0][0])  # type: ignore[arg-type]
        rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        # All gathers are started before any is waited for, so that they overlap; every rank starts them in the same
        # order, as collectives of one group require.
        collected: list[torch.Tensor] = []
        sent = []
        for owner, (parameter, group) in enumerate(jobs):
            rows = -(-parameter.shape[0] // ranks)  # FSDP2's rows per rank, except for the last ranks
            piece = _pad_rows(self._advance_momentum(parameter, group), rows)
            parts = [torch.empty_like(piece) for _ in range(ranks)] if owner == rank else None
            collected = parts or collected
            sent.append((piece, dist.gather(piece, parts, group=process_group, group_dst=owner, async_op=True)))
        for _, work in sent:
            work.wait()
        if rank < len(jobs):  # the last round may have fewer matrices than ranks
            parameter, group = jobs[rank]
            whole = torch.cat(collected)[: parameter.shape[0]]
            whole = orthogonalize(whole, group["ns_steps"])
            rows = len(collected[0])
            collected = [_pad_rows(whole[r * rows : (r + 1) * rows], rows) for r in range(ranks)]
        # The gathered pieces are no longer needed: the scatter overwrites them with the rows that come back.
        for owner, (piece, _) in enumerate(sent):
            parts = collected if owner == rank else None
            sent[owner] = (piece, dist.scatter(piece, parts, group=process_group, group_src=owner, async_op=True))
        for (parameter, group), (piece, work) in zip(jobs, sent):
            work.wait()
            self._apply_update(parameter, group, piece[: len(local_shard(parameter))])


def _pad_rows(piece: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a contiguous copy with `rows` rows, zeros at the end: collectives need equal shapes on all ranks."""
    padded = piece.new_zeros(rows, piece.shape[1])
    padded[: len(piece)] = piece
    return padded
