"""Measurements of the loop while it trains. They change no result, draw from no global generator and need no other rank."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rdt.model.transfer import to_device

SMALLEST_NORM = 1e-30
LATE = 4  # loops after which the change of the state should have become small


class CoreMonitor:
    """Collects measurements of one forward pass; the caller passes one in and reads it after the backward pass.

    Args:
        per_iteration: measure every iteration, not only the last.
        jacobian_steps: power-iteration steps for the largest singular value of the last iteration's Jacobian; 0 does not
            measure it.

    Attributes (0-dimensional float32 tensors, None until measured):
        spectral_radius: of the linear part of the recurrence, as the forward pass used it.
        state_norm: root mean square over channels of the final state, averaged over tokens.
        state_residual: |h_T - h_(T-1)| / |h_T|, before any norm at the end of the loop.
        token_correlation: mean cosine between the final states of different tokens of one sequence.
        norm_growth: |h_T| / |h_(T-1)| x (T - 1) / T, the mean over the sequences with T > 1: 1 if the state grows by the same
            amount in every iteration, more if it grows by a factor, less if it settles.
        late_residual: |h_T - h_(T-1)| / |h_T|, the mean over the sequences with T >= LATE.
        input_norm: of the term that the encoded input adds to the state in each iteration (`b e`), as `state_norm`.
        jacobian_norm: largest singular value of d h_T / d h_(T-1), over the sequences: a lower bound, close after some
            power-iteration steps.
    """

    NAMES = (
        "spectral_radius",
        "state_norm",
        "state_residual",
        "token_correlation",
        "norm_growth",
        "late_residual",
    )

    def __init__(self, per_iteration: bool = False, jacobian_steps: int = 0) -> None:
        self.per_iteration, self.jacobian_steps = per_iteration, jacobian_steps
        self.spectral_radius: Tensor | None = None
        self.state_norm: Tensor | None = None
        self.state_residual: Tensor | None = None
        self.token_correlation: Tensor | None = None
        self.norm_growth: Tensor | None = None
        self.late_residual: Tensor | None = None
        self.input_norm: Tensor | None = None
        self.jacobian_norm: Tensor | None = None
        # Per iteration: the index of each sequence, and values (3, sequences) or squared gradient norms (sequences,).
        self._iterations: list[tuple[tuple[int, ...], Tensor]] = []
        self._gradients: list[tuple[tuple[int, ...], Tensor]] = []

    @torch.no_grad()
    def measure_last(self, indices: tuple[int, ...], previous: Tensor, state: Tensor, spectral_radius: Tensor) -> None:
        """Measure the last iteration, number indices[i] of sequence i, falling; store the radius of its linear part.

        `previous` and `state` are (batch, sequence, dim).
        """
        self.spectral_radius = spectral_radius.detach()
        previous, state = previous.detach().float(), state.detach().float()
        self.state_norm = _rms(state).mean()
        norms, before, changes = (
            torch.linalg.vector_norm(x, dim=(1, 2)).clamp_min(SMALLEST_NORM)
            for x in (state, previous, state - previous)
        )
        norm = torch.linalg.vector_norm(state).clamp_min(SMALLEST_NORM)
        self.state_residual = torch.linalg.vector_norm(state - previous) / norm
        if state.shape[1] > 1:
            self.token_correlation = _token_correlation(state).mean()
        # After the first iteration there is nothing to compare with: the initial state may be zero.
        later, late = (sum(index + 1 >= loops for index in indices) for loops in (2, LATE))
        if later:
            loops = to_device(tuple(index + 1 for index in indices[:later]), state.device)
            self.norm_growth = (norms[:later] / before[:later] * (loops - 1) / loops).mean()
        if late:
            self.late_residual = (changes[:late] / norms[:late]).mean()

    @torch.no_grad()
    def measure_iteration(self, indices: tuple[int, ...], previous: Tensor, state: Tensor) -> None:
        """Measure an iteration, number indices[i] of sequence i (from 0), from `previous` to `state` (batch, sequence, dim)."""
        previous, state = previous.detach().float(), state.detach().float()
        norm = torch.linalg.vector_norm(state, dim=(1, 2)).clamp_min(SMALLEST_NORM)
        residual = torch.linalg.vector_norm(state - previous, dim=(1, 2)) / norm
        values = torch.stack((_rms(state).mean(1), residual, _token_correlation(state)))
        self._iterations.append((indices, values))

    def watch_gradient(self, indices: tuple[int, ...], state: Tensor) -> None:
        """Let the backward pass keep each sequence's squared gradient norm at the state, if that needs gradient."""

        def keep_square(gradient: Tensor) -> None:
            self._gradients.append((indices, gradient.detach().float().square().flatten(1).sum(1)))

        if state.requires_grad:
            state.register_hook(keep_square)

    def measure_input(self, input_term: Tensor) -> None:
        """Set `input_norm` from the term that the encoded input adds, (batch, sequence, dim)."""
        self.input_norm = _rms(input_term.detach().float()).mean()

    def readings(self) -> dict[str, object]:
        """Return the measurements of NAMES as numbers or None, and, if made, "jacobian_norm" and "iterations".

        With `per_iteration` also "iterations": lists over iterations 1 ... T of "state_norm", "state_residual" and
        "token_correlation", means over the sequences that reached it; of "gradient_norm" over all of them together, None
        where truncation cuts it off; and "input_norm".
        """
        values: dict[str, object] = {name: _to_number(getattr(self, name)) for name in self.NAMES}
        if self.jacobian_norm is not None:
            values["jacobian_norm"] = _to_number(self.jacobian_norm)
        if self._iterations:
            values["iterations"] = {**self._average_by_iteration(), "input_norm": _to_number(self.input_norm)}
        return values

    def _average_by_iteration(self) -> dict[str, list[float | None]]:
        """Return lists over iterations: means over sequences, and gradient norms over all sequences together."""
        # Sequences of different T are in different iterations at the same time, so values are added up by index.
        iterations = max(max(indices) for indices, _ in self._iterations) + 1
        sums, counts = torch.zeros(3, iterations), torch.zeros(iterations)
        for indices, measured in self._iterations:
            index = torch.tensor(indices)
            sums.index_add_(1, index, measured.cpu())
            counts.index_add_(0, index, torch.ones(len(indices)))
        squares: list[float | None] = [None] * iterations
        for indices, square in self._gradients:
            for t, value in zip(indices, square.tolist()):
                squares[t] = (squares[t] or 0.0) + value
        names = ("state_norm", "state_residual", "token_correlation")
        means: dict[str, list[float | None]] = {name: row for name, row in zip(names, (sums / counts).tolist())}
        return {**means, "gradient_norm": [None if square is None else square**0.5 for square in squares]}


def _to_number(value: Tensor | None) -> float | None:
    """Return a 0-dimensional tensor as a float, None for None."""
    return None if value is None else float(value)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension."""
    return x.square().mean(-1).sqrt()


def _token_correlation(state: Tensor) -> Tensor:
    """Return the mean cosine between different tokens, (batch, sequence, dim) -> (batch,); 0 for a single token."""
    directions = functional.normalize(state, dim=-1)
    # The squared norm of the summed directions counts every pair of tokens, and each token with itself.
    pairs = directions.sum(1).square().sum(-1) - directions.square().sum((1, 2))
    return pairs / max(state.shape[1] * (state.shape[1] - 1), 1)


def top_singular_values(function: Callable[[Tensor], Tensor], point: Tensor, steps: int) -> Tensor:
    """Return lower bounds of the largest singular value of a function's Jacobian J, by power iteration on J^T J.

    J v is a central difference and J^T u a backward pass, so the function needs one derivative only, and no more memory
    than one pass through it. The start is random and fixed. Where the function jumps, as at a change of an expert's
    routing, a difference may be larger than any derivative.

    Args:
        function: maps (batch, ...) to the same shape, each row independent of the others.
        point: at which J is taken, (batch, ...), float32 or wider.
        steps: at least 1; each costs two evaluations and a backward pass.

    Returns:
        (batch,): sqrt |J^T J v| for the unit vector v of the last step. Not larger than the singular value, up to
        rounding.
    """

    def norms(x: Tensor) -> Tensor:
        """Norm of each row, shaped to divide it."""
        sizes = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(SMALLEST_NORM)
        return sizes.view(-1, *[1] * (x.dim() - 1))

    point = point.detach()
    with torch.enable_grad():
        leaf = point.clone().requires_grad_()
        output = function(leaf)
    # The cube root of the rounding error balances it against the third derivative's.
    relative = torch.finfo(point.dtype).eps ** (1 / 3)
    step = relative * torch.maximum(norms(point), 0.01 * norms(output.detach()))
    vector = torch.randn(point.shape, generator=torch.Generator().manual_seed(0)).to(point)
    size = norms(vector)
    for _ in range(steps):
        vector = vector / size
        with torch.no_grad():
            pushed = (function(point + step * vector) - function(point - step * vector)) / (2 * step)
        (vector,) = torch.autograd.grad(output, leaf, pushed, retain_graph=True)
        size = norms(vector)
    return size.flatten().sqrt()
