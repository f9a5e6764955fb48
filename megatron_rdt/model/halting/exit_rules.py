"""Exit rules: when a token stops iterating, decided per token at inference.

With h_t the state after iteration t, p_t the coda's prediction from it, H the entropy of p_t and E the threshold:

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
from torch import Tensor

from megatron_rdt.model.halting.active_tokens import ActiveTokens
from megatron_rdt.model.halting.trained import HaltingUnit


@dataclass(frozen=True)
class ExitRule:
    """An exit rule with its thresholds.

    Attributes:
        kind: one of the names above.
        threshold: E. No unit for change and second_difference, nats for kl and kl_entropy, a probability for act and
            gate; act takes at most 1.
        entropy: E' of kl_entropy, in nats.
        hits: iterations in a row in which the rule must be met.
        min_loops: no token stops before this many iterations.
        in_order: a token stops only when every token before it in its document has stopped, in the same iteration at the
            latest. What has not reached a token yet through the tokens before it cannot change it either: it looks settled.
    """

    kind: str = "fixed"
    threshold: float = 0.0
    entropy: float = math.inf
    hits: int = 1
    min_loops: int = 1
    in_order: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind, or for a threshold, entropy, hits or min_loops out of range."""
        if self.kind != "fixed" and self.kind not in CRITERIA:
            raise ValueError(f"there is no exit rule {self.kind!r}; choose one of fixed, {', '.join(CRITERIA)}")
        if not self.threshold >= 0 or (self.kind == "act" and self.threshold > 1):
            limit = "from 0 to 1" if self.kind == "act" else "at least 0"
            raise ValueError(f"the threshold of the exit rule {self.kind} is {self.threshold}, it must be {limit}")
        if not self.entropy >= 0 or self.hits < 1:
            raise ValueError(f"the exit rule has entropy {self.entropy} and hits {self.hits}; at least 0 and 1")
        if self.min_loops < 1:
            raise ValueError(f"the exit rule has min_loops {self.min_loops}, it must be at least 1")

    @property
    def predicts(self) -> bool:
        """True if the rule looks at predictions, so that the coda runs after every iteration."""
        return self.kind in ("kl", "kl_entropy")


def read_exit_options(
    exit: str,
    threshold: float | None = None,
    entropy: float | None = None,
    hits: int = 1,
    min_loops: int = 1,
    in_order: bool = False,
    prefix: str = "",
) -> ExitRule | None:
    """Return the exit rule that options describe; None for `fixed`, which runs every token T times.

    Args:
        exit: the rule's kind.
        threshold, entropy, hits, min_loops, in_order: the attributes of `ExitRule`; None for one that is not given.
        prefix: in front of the options' names in a message, such as "--".

    Raises:
        ValueError: a threshold is missing, superfluous or out of range, or an option has no effect without a rule.
    """
    given = {f"{prefix}exit_threshold": threshold, f"{prefix}exit_entropy": entropy}
    wanted = {"fixed": [], "kl_entropy": list(given)}.get(exit, list(given)[:1])
    for name, value in given.items():
        if (value is None) == (name in wanted):
            needs = "needs" if name in wanted else "takes no"
            raise ValueError(f"{prefix}exit {exit} {needs} {name}")
    if exit == "fixed" and (hits, min_loops, in_order) != (1, 1, False):
        raise ValueError(
            f"{prefix}exit_hits, {prefix}exit_min_loops and {prefix}exit_in_order are for rules that stop tokens early. "
            f"Choose one with {prefix}exit"
        )
    if threshold is None:
        return None
    return ExitRule(exit, threshold, math.inf if entropy is None else entropy, hits, min_loops, in_order)


def check_rule_can_act(rule: ExitRule, loops: int, prefix: str = "") -> None:
    """Raise ValueError if no token can stop by a rule within T = `loops`; `prefix` is in front of the options' names."""
    for name, least in (("exit_min_loops", rule.min_loops), ("exit_hits", rule.hits)):
        if least > loops:
            raise ValueError(
                f"{prefix}{name} is {least}, but T is {loops}: no token could stop early. Lower it, or raise {prefix}loops"
            )


class ExitTrace:
    """Receives the number of iterations that each token ran in a forward pass.

    Attributes:
        iterations: (batch, sequence), int64; 0 for padding. None until a pass ended.
    """

    def __init__(self) -> None:
        self.iterations: Tensor | None = None

    def fill(self, loops: tuple[int, ...], tokens: Tensor, is_padding: Tensor | None) -> None:
        """Record that every token (batch, sequence) of row i ran loops[i] iterations, and padding none."""
        iterations = torch.tensor(loops, device=tokens.device)[:, None].expand(tokens.shape)
        self.iterations = iterations if is_padding is None else iterations.masked_fill(is_padding, 0)


@dataclass
class IterationResult:
    """The outcome of an iteration for the active tokens, (rows, columns, ...) each, that a criterion judges.

    Attributes:
        active: indices of these tokens.
        previous, state: collapsed states before and after the iteration.
        logits: predictions from the state, None where the rule does not need them.
        halted: sum of ACT's halting probabilities, None without ACT.
    """

    active: ActiveTokens
    previous: Tensor
    state: Tensor
    logits: Tensor | None
    halted: Tensor | None


class Criterion:
    """Decides after every iteration which of the active tokens meet the rule. One object serves one forward pass.

    Values of earlier iterations are kept for all tokens and taken for those that are still active.

    Args:
        rule: with the thresholds.
        unit: trained halting, where the model has it.
    """

    def __init__(self, rule: ExitRule, unit: HaltingUnit | None) -> None:
        self.rule, self.unit = rule, unit

    def is_met(self, seen: IterationResult) -> Tensor | None:
        """Return (rows, columns) booleans, True for tokens that meet the rule; None if none can."""
        raise NotImplementedError


class ChangeCriterion(Criterion):
    """Met where the state changes little."""

    def is_met(self, seen: IterationResult) -> Tensor:
        """Return |h_t - h_(t-1)| < E |h_t|."""
        return _norm(seen.state - seen.previous) < self.rule.threshold * _norm(seen.state)


class SecondDifferenceCriterion(Criterion):
    """Met where the change of the state changes little."""

    changes: Tensor | None = None

    def is_met(self, seen: IterationResult) -> Tensor | None:
        """Return |h_t - 2 h_(t-1) + h_(t-2)| < E |h_t|, None at the first call; keep the change for the next."""
        change = seen.state - seen.previous
        if self.changes is None:
            self.changes = change
            return None
        difference = _norm(change - seen.active.take(self.changes))
        self.changes = seen.active.put(self.changes, change)
        return difference < self.rule.threshold * _norm(seen.state)


class DivergenceCriterion(Criterion):
    """Met where the prediction changes little and, for kl_entropy, has a low entropy."""

    before: Tensor | None = None

    def is_met(self, seen: IterationResult) -> Tensor | None:
        """Return KL(p_t || p_(t-1)) < E, for kl_entropy and H(p_t) < E'; None at the first call; keep p_t."""
        assert seen.logits is not None, "the loop predicts for this rule"
        wide = torch.promote_types(seen.logits.dtype, torch.float32)
        new = seen.logits.log_softmax(-1, dtype=wide)
        if self.before is None:
            self.before = new
            return None
        old = seen.active.take(self.before)
        self.before = seen.active.put(self.before, new)
        probabilities = new.exp()
        is_small = (probabilities * (new - old)).sum(-1) < self.rule.threshold
        if self.rule.kind == "kl_entropy":
            is_small = is_small & (-(probabilities * new).sum(-1) < self.rule.entropy)
        return is_small


class ActCriterion(Criterion):
    """Met where ACT's halting probabilities add up to the threshold."""

    def is_met(self, seen: IterationResult) -> Tensor:
        """Return sum of the halting probabilities >= E; raise ValueError for a model without ACT."""
        if seen.halted is None:
            raise ValueError("the exit rule act is for models with model.halting: act; choose another")
        return seen.halted >= self.rule.threshold


class GateCriterion(Criterion):
    """Met where the exit gate's probability of having exited by now reaches the threshold."""

    left: Tensor | None = None

    def is_met(self, seen: IterationResult) -> Tensor:
        """Return 1 - product of (1 - g_t) >= E; keep the product; raise ValueError for a model without the gate."""
        if self.unit is None or seen.halted is not None:
            raise ValueError("the exit rule gate is for models with model.halting: gate; choose another")
        stay = 1 - self.unit(seen.state)
        if self.left is None:
            self.left = torch.ones_like(stay)
        left = seen.active.take(self.left) * stay
        self.left = seen.active.put(self.left, left)
        return 1 - left >= self.rule.threshold


class ActMixture:
    """ACT's weighted sum of states (Graves 2016), from which a token predicts when it stops.

    Args:
        unit: computes the halting probabilities.
        threshold: sum of probabilities at which a token's weights are complete.
    """

    def __init__(self, unit: HaltingUnit, threshold: float) -> None:
        self.unit, self.threshold = unit, threshold
        self.mixed: Tensor | None = None
        self.halted: Tensor | None = None

    def update(self, active: ActiveTokens, state: Tensor) -> tuple[Tensor, Tensor]:
        """Add active tokens' states (rows, columns, dim); return their answers, if they stop now, and halting sums.

        The answer is the mixture if the token stopped now: this state takes all the weight that is left.
        """
        probability = self.unit(state)
        if self.mixed is None or self.halted is None:
            self.mixed, self.halted = torch.zeros_like(state), torch.zeros_like(probability)
        mixed, halted = active.take(self.mixed), active.take(self.halted)
        # A token may run on after its weights are complete, where the rule is another than ACT: later states weigh 0.
        is_open = (halted < self.threshold) | (halted == 0)  # even with a threshold of 0 the first state counts
        left = torch.where(is_open, 1 - halted, 0.0)
        answer = mixed + left.unsqueeze(-1) * state
        is_complete = halted + probability >= self.threshold
        weight = torch.where(is_complete, left, torch.where(is_open, probability, 0.0))
        halted = torch.where(is_open & is_complete, 1.0, halted + weight)
        self.mixed = active.put(self.mixed, mixed + weight.unsqueeze(-1) * state)
        self.halted = active.put(self.halted, halted)
        return answer, halted


CRITERIA: dict[str, type[Criterion]] = {
    "change": ChangeCriterion,
    "second_difference": SecondDifferenceCriterion,
    "kl": DivergenceCriterion,
    "kl_entropy": DivergenceCriterion,
    "act": ActCriterion,
    "gate": GateCriterion,
}
"""Exit rules by name; `fixed` needs none."""


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension."""
    return torch.linalg.vector_norm(x, dim=-1)
