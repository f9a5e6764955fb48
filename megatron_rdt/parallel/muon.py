"""Muon: the momentum of a matrix, made orthogonal, is its update (Jordan 2024, kellerjordan.github.io/posts/muon).

    M = m M + (1 - m) G                     G the gradient, m `momentum`
    D = m M + (1 - m) G                     where `nesterov`, otherwise D = M
    O = U V^T of D = U S V^T                by `orthogonalize`
    W = (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

The factor gives every update a root mean square of 0.2, about that of AdamW, so AdamW's learning rate and weight decay
carry over (Liu et al. 2025, arXiv:2502.16982).

An update needs the whole matrix. Of matrices that FSDP2 has split by rows, n ranks take n at a time: each rank collects
one of them, makes it orthogonal, and gives every rank its rows back. So each is computed once, and no rank ever holds
more than one. Experts, (experts, rows, columns), are split between matrices: each rank has its own whole.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

# Coefficients of Jordan's quintic: steepest at 0, where small singular values are.
QUINTIC = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2
EPS = 1e-7

Job = tuple[torch.Tensor, dict[str, Any]]
"""A parameter and the group that it is in."""


def orthogonalize(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """(..., rows, columns) -> about U V^T of each U S V^T, by Newton-Schulz steps in the dtype of the input.

    After 5 steps singular values lie between 0.68 and 1.21, except those that were below 0.0015 of the matrix's norm.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (norm + EPS).to(x.dtype)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows_are_spread(parameter: torch.Tensor) -> bool:
    """Whether no rank has the whole matrix."""
    return isinstance(parameter, DTensor) and parameter.dim() == 2 and _sharing(parameter).size() > 1


def _sharing(parameter: DTensor) -> ProcessGroup:
    """The ranks that have rows of the matrix; the last axis of its mesh, before which there may be replicas."""
    mesh = parameter.device_mesh
    return mesh.get_group(mesh.ndim - 1)


class Muon(torch.optim.Optimizer):
    """For matrices, and for batches of matrices; whole, or split along their first dimension by FSDP2.

    An attribute `found_inf`, 0-dimensional on the device, makes a step that changes nothing where it is not 0, as in
    torch's own optimizers.

    Args:
        params: parameters or groups; a group may have options of its own.
        lr: learning rate.
        momentum: decay of the running mean of gradients.
        nesterov: look one step ahead.
        ns_steps: Newton-Schulz steps.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, {**options, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; under sharding every rank must call this."""
        jobs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        spread = [job for job in jobs if _rows_are_spread(job[0])]
        for parameter, group in jobs:
            if not _rows_are_spread(parameter):
                direction = self._direction(parameter, group)  # where a rank has no expert, it has state all the same
                if direction.numel():
                    self._apply(parameter, group, orthogonalize(direction, group["ns_steps"]))
        # Ranks work at the same time on matrices of about the same size.
        spread.sort(key=lambda job: job[0].numel(), reverse=True)
        while spread:
            ranks = _sharing(spread[0][0]).size()
            self._step_together(spread[:ranks])
            del spread[:ranks]

    def _direction(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """What to make orthogonal, this rank's part; advances the momentum. On a GPU, rounded to bfloat16."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, momentum = _own(parameter.grad), _own(state["momentum"])
        self._replace(momentum, momentum.lerp(gradient, 1 - group["momentum"]))
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return direction.bfloat16() if direction.is_cuda else direction

    def _apply(self, parameter: torch.Tensor, group: dict[str, Any], update: torch.Tensor) -> None:
        """Decay this rank's part and add its part of the orthogonal matrix."""
        own, lr = _own(parameter), group["lr"]
        decayed = own * (1 - lr * group["weight_decay"])
        self._replace(own, decayed.add_(update, alpha=-lr * UPDATE_RMS * math.sqrt(max(parameter.shape[-2:]))))

    def _replace(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Write `new` into `old`, unless the step is not to be taken; nobody waits for the device to know."""
        found_inf = getattr(self, "found_inf", None)
        old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))

    def _step_together(self, jobs: list[Job]) -> None:
        """Step matrices split by rows, at most as many as there are ranks; the i-th is the i-th rank's work."""
        process_group = _sharing(jobs[0][0])  # type: ignore[arg-type]
        rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        collected: list[torch.Tensor] = []
        sent = []
        for owner, (parameter, group) in enumerate(jobs):
            rows = -(-parameter.shape[0] // ranks)  # of every rank but the last ones
            piece = _padded(self._direction(parameter, group), rows)
            parts = [torch.empty_like(piece) for _ in range(ranks)] if owner == rank else None
            collected = parts or collected
            sent.append((piece, dist.gather(piece, parts, group=process_group, group_dst=owner, async_op=True)))
        for _, work in sent:
            work.wait()
        if rank < len(jobs):
            parameter, group = jobs[rank]
            whole = torch.cat(collected)[: parameter.shape[0]]
            whole = orthogonalize(whole, group["ns_steps"])
            collected = [_padded(part, len(collected[0])) for part in _split(whole, len(collected[0]), ranks)]
        for owner, (piece, _) in enumerate(sent):
            parts = collected if owner == rank else None
            sent[owner] = (piece, dist.scatter(piece, parts, group=process_group, group_src=owner, async_op=True))
        for (parameter, group), (piece, work) in zip(jobs, sent):
            work.wait()
            self._apply(parameter, group, piece[: len(_own(parameter))])


def _padded(piece: torch.Tensor, rows: int) -> torch.Tensor:
    """A contiguous copy with zeros below, `rows` rows: collectives want equal shapes."""
    padded = piece.new_zeros(rows, piece.shape[1])
    padded[: len(piece)] = piece
    return padded


def _split(matrix: torch.Tensor, rows: int, ranks: int) -> list[torch.Tensor]:
    """What each rank has of a matrix that is split by rows; the last ones may have fewer, or none."""
    return [matrix[rank * rows : (rank + 1) * rows] for rank in range(ranks)]
