"""The training losses of one forward pass, as sums over its tokens: cross entropy, z-loss, and those of trained halting."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.cross_entropy import ScoreChunk, cross_entropy, score_targets
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.token_split import WholeTokens


def _mask_values(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return values (..., batch, sequence) with 0 for every token whose target does not count."""
    return values if counted is None else values * counted


@dataclass
class TrainingLosses:
    """Computes the losses from the core's output; the full logits are never held in memory.

    Attributes:
        config: of the model.
        read_out: coda and final norm, from (state, context) to features (batch, sequence, dim).
        head_matrix: (vocab_size, dim).
        token_split: the tokens and the part of the vocabulary that this rank has.
        z_weight: weight of the squared log-partition function.
        score: see `cross_entropy`; None where it is not compiled.
    """

    config: ModelConfig
    read_out: Callable[[Tensor, LayerContext], Tensor]
    head_matrix: Tensor
    token_split: WholeTokens
    z_weight: float
    score: ScoreChunk | None = None

    def sums(
        self, state: Tensor, extras: dict[str, Tensor], targets: Tensor, context: LayerContext, loss_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Return objective, cross entropy and halting's terms by name, summed over the tokens whose target counts.

        Args:
            state: output of the core, (batch, sequence, dim).
            extras: what trained halting added to it, see `RecurrentCore.forward`.
            targets: (batch, sequence) ids to predict.
            context: of the forward pass.
            loss_mask: (batch, sequence), True where a target counts; None counts all.

        Returns:
            "objective": the sum to minimise, with gradient; "cross_entropy": of the prediction from the last iteration.
            With `model.halting: act` also "ponder" (iterations plus remainder); with `gate`, where gradient is enabled,
            "exit_entropy" and "exit_iteration" (entropy and mean of the exit distribution).
        """
        counted = None
        if loss_mask is not None:
            counted = self.token_split.residual_part(loss_mask.to(torch.promote_types(state.dtype, torch.float32)))
        if self.config.halting == "gate" and torch.is_grad_enabled():
            return self._gate_sums(state, extras, targets, context, counted)
        features = self.read_out(state, context)
        objective, entropy, _ = self._cross_entropy(features, self.head_matrix, targets, counted, self.z_weight)
        if self.config.halting != "act":
            return {"objective": objective, "cross_entropy": entropy}
        ponder = self.token_split.sum_over_tokens(_mask_values(extras["ponder"], counted))
        objective = objective + self.config.halting_weight * ponder
        return {"objective": objective, "cross_entropy": entropy, "ponder": ponder.detach()}

    def row_sums(
        self, state: Tensor, targets: Tensor, context: LayerContext, loss_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Return "cross_entropy" and "misses", each summed over the counted targets of a row, (batch,), without gradient.

        A miss is a target that is not the likeliest id. The arguments are those of `sums`.
        """
        features, _, shards = self.token_split.gather_for_loss(self.read_out(state, context), None)
        softcap = self.config.logit_softcap
        losses, misses = score_targets(features, self.head_matrix, targets, softcap=softcap, shards=shards)
        counted = torch.ones_like(misses) if loss_mask is None else loss_mask
        sums = {"cross_entropy": losses, "misses": misses.to(losses.dtype)}
        return {name: torch.where(counted, values, 0.0).sum(1) for name, values in sums.items()}

    def _cross_entropy(
        self, features: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor | None, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three sums of `cross_entropy` over the local tokens and the whole vocabulary.

        Features and weights are of the residual stream's tokens; `matrix` has this rank's rows of the output matrix.
        """
        features, weights, shards = self.token_split.gather_for_loss(features, weights)
        options = {"softcap": self.config.logit_softcap, "z_weight": z_weight}
        return cross_entropy(features, matrix, targets, weights=weights, shards=shards, score=self.score, **options)

    def _gate_sums(
        self, state: Tensor, extras: dict[str, Tensor], targets: Tensor, context: LayerContext, counted: Tensor | None
    ) -> dict[str, Tensor]:
        """Return `sums` for the exit gate: every iteration's cross entropy, weighted by the probability of exiting there.

        `counted` is 1 where a target counts, else 0.
        """
        config, exits = self.config, extras["exit"]  # (T, batch, sequence)
        weights = _mask_values(exits, counted)
        # The iterations are stacked as further rows of the batch, so the coda runs once: its weights are gathered once
        # whatever T is, and ranks with different T issue the same collectives.
        rows = torch.arange(len(targets), device=targets.device).repeat(len(exits))
        features = self.read_out(extras["states"].flatten(0, 1), context.rows(rows))
        flat = weights.flatten(0, 1)
        objective, _, _ = self._cross_entropy(features, self.head_matrix, targets[rows], flat, self.z_weight)
        last = features[-len(targets) :].detach()
        _, entropy, _ = self._cross_entropy(last, self.head_matrix.detach(), targets, counted, z_weight=0.0)
        # The gradient of p log p is infinite at p = 0, which a probability reaches by underflow.
        exit_entropy = torch.special.entr(exits.clamp_min(torch.finfo(exits.dtype).tiny))
        exit_entropy = self.token_split.sum_over_tokens(_mask_values(exit_entropy, counted))
        iterations = torch.arange(1, len(exits) + 1, device=exits.device, dtype=exits.dtype)
        return {
            # Adding 0 times the core's output keeps it in the graph: sharding engines wait for a gradient of every output.
            "objective": objective - config.halting_weight * exit_entropy + 0 * state.sum(),
            "cross_entropy": entropy,
            "exit_entropy": exit_entropy.detach(),
            "exit_iteration": self.token_split.sum_over_tokens(iterations @ weights.detach().flatten(1)),
        }
