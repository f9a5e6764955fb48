"""Exit rules: when a token stops iterating, decided per token at inference.

With h_t the state after iteration t, p_t the prediction that the coda makes of it, H its entropy and E the threshold:

    fixed              never before T
    change             |h_t - h_(t-1)| < E |h_t|
    second_difference  |h_t - 2 h_(t-1) + h_(t-2)| < E |h_t|       (arXiv:2509.23314: unscaled, twice in a row)
    kl                 KL(p_t || p_(t-1)) < E                      (Huginn, arXiv:2502.05171)
    kl_entropy         KL(p_t || p_(t-1)) < E and H(p_t) < E'
    act                sum of halting probabilities >= E           (arXiv:1603.08983)
    gate               1 - product of (1 - g_t) >= E               (Ouro, arXiv:2510.25741)
"""

import math
from dataclasses import dataclass

import torch

from megatron_rdt.model.halting.active_tokens import ActiveTokens
from megatron_rdt.model.halting.trained import HaltingUnit


@dataclass(frozen=True)
class ExitRule:
    """When a token stops iterating.

    Attributes:
        kind: one of the names above.
        threshold: E. No unit for change and second_difference, nats for kl and kl_entropy, a probability for act and
            gate; act takes at most 1.
        entropy: kl_entropy: E', in nats.
        hits: iterations in a row for which the rule must hold.
    """

    kind: str = "fixed"
    threshold: float = 0.0
    entropy: float = math.inf
    hits: int = 1

    def __post_init__(self) -> None:
        if self.kind != "fixed" and self.kind not in CRITERIA:
            raise ValueError(f"there is no exit rule {self.kind!r}; choose one of fixed, {', '.join(CRITERIA)}")
        if not self.threshold >= 0 or (self.kind == "act" and self.threshold > 1):
            limit = "from 0 to 1" if self.kind == "act" else "at least 0"
            raise ValueError(f"the threshold of the exit rule {self.kind} is {self.threshold}, it must be {limit}")
        if not self.entropy >= 0 or self.hits < 1:
            raise ValueError(f"the exit rule has entropy {self.entropy} and hits {self.hits}; at least 0 and 1")

    @property
    def predicts(self) -> bool:
        """Whether the coda runs after every iteration."""
        return self.kind in ("kl", "kl_entropy")


class ExitTrace:
    """Receives what an exit rule did in a pass.

    Attributes:
        iterations: (batch, sequence) iterations that each token ran, int64; 0 for padding. None until a pass ended.
    """

    def __init__(self) -> None:
        self.iterations: torch.Tensor | None = None

    def fill(self, loops: tuple[int, ...], tokens: torch.Tensor, is_padding: torch.Tensor | None) -> None:
        """Every token (batch, sequence) of a row ran as many iterations as `loops` says; those in `is_padding` are none."""
        iterations = torch.tensor(loops, device=tokens.device)[:, None].expand(tokens.shape)
        self.iterations = iterations if is_padding is None else iterations.masked_fill(is_padding, 0)


@dataclass
class Iteration:
    """What a criterion sees of an iteration, each for the active tokens, (rows, places, ...).

    Attributes:
        previous, state: before and after it, as the coda would see them.
        logits: its predictions, None where no rule needs them.
        halted: sum of ACT's halting probabilities, None without ACT.
    """

    active: ActiveTokens
    previous: torch.Tensor
    state: torch.Tensor
    logits: torch.Tensor | None
    halted: torch.Tensor | None


class Criterion:
    """Decides after every iteration which of the active tokens meet the rule. One object serves one pass.

    Args:
        rule: with the thresholds.
        unit: trained halting, where the model has it.
    """

    def __init__(self, rule: ExitRule, unit: HaltingUnit | None) -> None:
        self.rule, self.unit = rule, unit

    def holds(self, seen: Iteration) -> torch.Tensor | None:
        """(rows, places) booleans; None for none."""
        raise NotImplementedError


class Change(Criterion):
    """The state moves little."""

    def holds(self, seen: Iteration) -> torch.Tensor:
        """|h_t - h_(t-1)| < E |h_t|."""
        return _norm(seen.state - seen.previous) < self.rule.threshold * _norm(seen.state)


class SecondDifference(Criterion):
    """The steps of the state are alike."""

    steps: torch.Tensor | None = None

    def holds(self, seen: Iteration) -> torch.Tensor | None:
        """|h_t - 2 h_(t-1) + h_(t-2)| < E |h_t|, from the second iteration on."""
        step = seen.state - seen.previous
        if self.steps is None:
            self.steps = step
            return None
        bend = _norm(step - seen.active.take(self.steps))
        self.steps = seen.active.put(self.steps, step)
        return bend < self.rule.threshold * _norm(seen.state)


class Divergence(Criterion):
    """The prediction changes little, and, where a limit is given, is certain."""

    before: torch.Tensor | None = None

    def holds(self, seen: Iteration) -> torch.Tensor | None:
        """KL(p_t || p_(t-1)) < E, from the second iteration on; with kl_entropy also H(p_t) < E'."""
        assert seen.logits is not None, "the loop predicts for this rule"
        wide = torch.promote_types(seen.logits.dtype, torch.float32)
        new = seen.logits.log_softmax(-1, dtype=wide)
        if self.before is None:
            self.before = new
            return None
        old = seen.active.take(self.before)
        self.before = seen.active.put(self.before, new)
        probabilities = new.exp()
        small = (probabilities * (new - old)).sum(-1) < self.rule.threshold
        if self.rule.kind == "kl_entropy":
            small = small & (-(probabilities * new).sum(-1) < self.rule.entropy)
        return small


class Halted(Criterion):
    """ACT has used up the probability."""

    def holds(self, seen: Iteration) -> torch.Tensor:
        """Sum of the halting probabilities >= E."""
        if seen.halted is None:
            raise ValueError("the exit rule act is for models with model.halting: act; choose another")
        return seen.halted >= self.rule.threshold


class Gated(Criterion):
    """The exit gate has let the token out with enough probability."""

    left: torch.Tensor | None = None

    def holds(self, seen: Iteration) -> torch.Tensor:
        """1 - product of (1 - g_t) >= E."""
        if self.unit is None or seen.halted is not None:
            raise ValueError("the exit rule gate is for models with model.halting: gate; choose another")
        stay = 1 - self.unit(seen.state)
        if self.left is None:
            self.left = torch.ones_like(stay)
        left = seen.active.take(self.left) * stay
        self.left = seen.active.put(self.left, left)
        return 1 - left >= self.rule.threshold


class Mixture:
    """ACT's weighted state (Graves 2016): what the coda would read if a token stopped now.

    Args:
        unit: gives the halting probabilities.
        threshold: their sum at which a token's weights are complete.
    """

    def __init__(self, unit: HaltingUnit, threshold: float) -> None:
        self.unit, self.threshold = unit, threshold
        self.mixed: torch.Tensor | None = None
        self.halted: torch.Tensor | None = None

    def update(self, active: ActiveTokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the states of the active tokens, (rows, places, dim); their answers and sums of probabilities."""
        probability = self.unit(state)
        if self.mixed is None or self.halted is None:
            self.mixed, self.halted = torch.zeros_like(state), torch.zeros_like(probability)
        mixed, halted = active.take(self.mixed), active.take(self.halted)
        running = (halted < self.threshold) | (halted == 0)  # with a threshold of 0 too, the first state counts
        left = torch.where(running, 1 - halted, 0.0)
        answer = mixed + left.unsqueeze(-1) * state
        complete = halted + probability >= self.threshold
        weight = torch.where(complete, left, torch.where(running, probability, 0.0))
        halted = torch.where(running & complete, 1.0, halted + weight)
        self.mixed = active.put(self.mixed, mixed + weight.unsqueeze(-1) * state)
        self.halted = active.put(self.halted, halted)
        return answer, halted


CRITERIA: dict[str, type[Criterion]] = {
    "change": Change,
    "second_difference": SecondDifference,
    "kl": Divergence,
    "kl_entropy": Divergence,
    "act": Halted,
    "gate": Gated,
}
"""Exit rules by name; `fixed` needs none."""


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1)
