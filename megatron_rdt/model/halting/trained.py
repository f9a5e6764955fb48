"""Trained halting: a unit that reads the state after each iteration and outputs each token's probability of stopping there.

ACT (Graves 2016, arXiv:1603.08983) mixes the states of all iterations by their halting probabilities; the ponder cost,
iterations plus remainder, is added to the loss. The exit gate (Ouro, arXiv:2510.25741) mixes the losses instead and
rewards the entropy of the exit distribution, so that no iteration is given up early in training.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig


class HaltingUnit(nn.Module):
    """The halting probability of each token, sigmoid(w h + b): (batch, sequence, dim) -> (batch, sequence)."""

    # About one token in twenty stops after the first iteration of an untrained model.
    INITIAL_VALUES: ClassVar[dict[str, float]] = {"weight": 0.0, "bias": -3.0}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.dim))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, state: Tensor) -> Tensor:
        """Return the halting probabilities, float32 or wider."""
        wide = torch.promote_types(state.dtype, torch.float32)
        return torch.sigmoid(state.to(wide) @ self.weight.to(wide) + self.bias.to(wide))


class ActTracker:
    """The running sums of ACT over the iterations of one forward pass.

    Weights sum to 1 for every token: the remainder goes to the iteration in which the token stops, or to the last one.

    Args:
        unit: computes the probabilities.
        threshold: cumulative probability at which a token stops.
    """

    def __init__(self, unit: HaltingUnit, threshold: float) -> None:
        self.unit, self.threshold = unit, threshold
        self.cumulative: Tensor | None = None
        self.output: Tensor | None = None
        self.ponder: Tensor | None = None

    def update(self, state: Tensor, last: bool) -> None:
        """Add the state after an iteration, (sequences, tokens, dim); sequences that just joined are the last rows."""
        probability = self.unit(state)
        cumulative = _extend_sums(self.cumulative, probability)
        output = _extend_sums(self.output, state)
        ponder = _extend_sums(self.ponder, probability)
        # All tokens are computed to the end in training; a token that has stopped only weighs 0 from then on.
        running = cumulative < self.threshold
        left = 1 - cumulative
        stops = (cumulative + probability >= self.threshold) | last
        weight = torch.where(stops, left, probability) * running
        # N + R: 1 for every iteration that was run, and the remainder in the one where the token stops. Adding 0 times
        # the probability gives the unit a gradient, if zero, also where there is only one iteration.
        self.ponder = ponder + running + torch.where(stops & running, left, 0.0) + 0 * probability
        self.output = output + weight.unsqueeze(-1) * state
        self.cumulative = torch.where(running, torch.where(stops, 1.0, cumulative + probability), cumulative)

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of weighted states (sequences, tokens, dim), and {"ponder": (sequences, tokens)}."""
        assert self.output is not None
        assert self.ponder is not None
        return self.output, {"ponder": self.ponder}


def _extend_sums(sums: Tensor | None, like: Tensor) -> Tensor:
    """Return running sums with as many rows as `like`: zeros for the sequences that have just joined."""
    if sums is None:
        return torch.zeros_like(like)
    if len(sums) == len(like):
        return sums
    return torch.cat((sums, torch.zeros_like(like[len(sums) :])))


class GateTracker:
    """Keeps the state and the exit probability of every iteration of one forward pass; all sequences have one T.

    p_t = g_t (1 - g_1) ... (1 - g_(t-1)); the last iteration gets what is left, so the p_t sum to 1.
    """

    def __init__(self, unit: HaltingUnit) -> None:
        self.unit = unit
        self.states: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self._left: Tensor | None = None

    def update(self, state: Tensor, last: bool) -> None:
        """Keep an iteration's state (sequences, tokens, dim) and exit probability; ValueError if sequences join."""
        gate = self.unit(state)
        left = torch.ones_like(gate) if self._left is None else self._left
        if len(left) != len(gate):
            raise ValueError("the exit gate's objective needs one T for all sequences of a forward pass")
        self.states.append(state)
        # Adding 0 times the gate gives the unit a gradient, if zero, also where there is only one iteration.
        self.probabilities.append(left + 0 * gate if last else gate * left)
        self._left = left * (1 - gate)

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the last state, and {"states": (T, sequences, tokens, dim), "exit": (T, sequences, tokens)}."""
        return self.states[-1], {"states": torch.stack(self.states), "exit": torch.stack(self.probabilities)}


def make_tracker(unit: HaltingUnit | None, config: ModelConfig) -> ActTracker | GateTracker | None:
    """Return ACT's tracker, or with gradient enabled the gate's, for one forward pass; None in the other cases.

    The gate changes the objective only, so without gradient its states are not kept.
    """
    if unit is None:
        return None
    if config.halting == "act":
        return ActTracker(unit, config.halting_threshold)
    return GateTracker(unit) if torch.is_grad_enabled() else None
