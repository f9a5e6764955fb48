"""The loop ring at work: states travel from stage to stage, one lap per iteration, and gradients travel back.

Each process runs prelude and coda of its own sequences; in between, the sequences of all S processes of a ring circulate
together, each alone and with a T of its own. Stage 0 injects: it is sent the initial state and the prepared encoded input
of each sequence when that enters, and finishes each iteration (signals, norm, the injection's update) when the
output of the last layers arrives. See `ring_schedule.py` for who computes what when.

The first T - k laps keep nothing. Each visit of the last k is a graph of its own, from the tensors that arrive to those
that leave; the backward pass runs the ring in reverse and goes through these graphs one by one. To the rest of the model
the whole loop is one autograd function.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed import ProcessGroup

from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.linear import Rounded, use_rounded
from megatron_rdt.model.transfer import to_device
from megatron_rdt.parallel.ring_context import gather_rows, has_own_rows
from megatron_rdt.parallel.ring_mail import RingMail, Tensors
from megatron_rdt.parallel.ring_schedule import Visit, schedule_ring
from megatron_rdt.parallel.ring_stage import StageWeights


@dataclass(frozen=True)
class TracedVisit:
    """When a process computed a visit, in seconds since `RingLoop.trace` was set; for the picture and the benchmark.

    Attributes:
        phase: forward or backward.
        tick: of the schedule.
        stage: that computed it.
        visit: its sequence and lap.
        has_grad: whether the lap carries gradient.
        begin, end: seconds of the process's monotonic clock.
    """

    phase: str
    tick: int
    stage: int
    visit: Visit
    has_grad: bool
    begin: float
    end: float


class RingLoop:
    """One process's part of a loop ring; the value of `RecurrentCore.ring`.

    Args:
        group: the processes of the ring, in the order of their stages.
        layers: numbers of this stage's core layers.
        weights: of these layers.

    Attributes:
        stage, stages: this process's stage, and their number.
        trace: receives every visit of this process; None where nobody asks.
    """

    def __init__(self, group: ProcessGroup, layers: range, weights: StageWeights) -> None:
        self.group, self.layers, self.weights = group, layers, weights
        self.stage, self.stages = group.rank(), group.size()
        self.trace: list[TracedVisit] | None = None

    def run(
        self, core: RecurrentCore, state: Tensor, precomputed: Tensor, context: LayerContext, plan: DepthPlan
    ) -> tuple[Tensor, Tensor]:
        """Run every iteration of this ring's sequences; see `StateRing`. Every process of the ring has as many sequences."""
        with_grad = torch.is_grad_enabled()
        ring_pass = _RingPass(self, core, context, plan, with_grad)
        if not with_grad:
            return ring_pass.forward(state, precomputed)
        return _Ring.apply(ring_pass, state, precomputed, *ring_pass.shared.values())


class _Ring(torch.autograd.Function):
    """A pass of the ring: a function of initial states, prepared inputs and the weights that all processes share."""

    @staticmethod
    def forward(
        ctx: Any, ring_pass: "_RingPass", state: Tensor, precomputed: Tensor, *shared: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.ring_pass = ring_pass
        last, before = ring_pass.forward(state, precomputed)
        ctx.mark_non_differentiable(before)
        return last, before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ring_pass, ctx.ring_pass = ctx.ring_pass, None
        return (None, *ring_pass.backward(grads[0]))


class _Graph:
    """A visit that carries gradient: leaves that stand for what arrived, and the graph from them to the results.

    Of the results only their edges in the graph are kept, not the values, which other processes have.

    Attributes:
        inputs: the leaves.
        results: what was computed, without gradient; to be taken away by the caller.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: Sequence[Tensor], run: Callable[..., Any]) -> None:
        self.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            outputs = run(function, *self.inputs)
        self.results: Tensors = [output.detach() for output in outputs]
        self._edges = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]

    def backward(self, grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor | None]:
        """Add the gradients of `weights` to their `.grad`; return those of the inputs, None for one that is not read."""
        reached = [(edge, grad) for edge, grad in zip(self._edges, grads) if edge is not None and grad is not None]
        edges, given = zip(*reached)
        torch.autograd.backward(edges, given, inputs=[*self.inputs, *weights])
        return [leaf.grad for leaf in self.inputs]


class _RingPass:
    """One forward pass of the ring on one process and, with gradient, its backward pass.

    Attributes:
        loops, counted: T and the number of laps with gradient of every sequence of the ring.
        shared: weights that every process has, of which stage 0 (adaln: every stage) computes gradients, by module and name.
        leaves: what stands in their place while the ring runs, so that gradients of visits add up there.
        graphs: by sequence and lap; lap T is the end of the last one, on stage 0.
        carries, prepared, states: on stage 0, by sequence: the injection's carry (backward: its gradient), the prepared
            input (backward: its gradient so far), and the state before the last lap.
        mail: tensors to send or just received.
    """

    def __init__(
        self, ring: RingLoop, core: RecurrentCore, context: LayerContext, plan: DepthPlan, with_grad: bool
    ) -> None:
        self.ring, self.core, self.with_grad = ring, core, with_grad
        self.rows = len(plan.iterations)
        peers = plan.peers or (plan.iterations,) * ring.stages
        if len(peers) != ring.stages or {len(each) for each in peers} != {self.rows}:
            raise ValueError(
                f"the ring has {ring.stages} processes with {self.rows} sequences each, the plan has T {peers}"
            )
        self.loops = [loops for each in peers for loops in each]
        k = max(self.loops) if plan.backprop is None else plan.backprop
        self.counted = [min(k, loops) for loops in self.loops]
        self.owners = [stage for stage in range(ring.stages) for _ in range(self.rows)]
        self.schedule = schedule_ring(ring.stages, self.loops, self.owners)
        self.first_row = ring.stage * self.rows  # number of this process's first sequence
        self.context, self.contexts = context, [context.rows(slice(0, 1))] * len(self.loops)
        if has_own_rows(context, core.config.value_embeddings != "none"):
            every = gather_rows(context, ring.group)
            self.contexts = [every.rows(slice(i, i + 1)) for i in range(len(self.loops))]
        names = ("layers.", "encoded_norm.", "input_matrix.", "last_norm.", "output_matrix.", "initial")
        self.shared: dict[tuple[nn.Module, str], Tensor] = {}
        for path, module in core.named_modules() if with_grad else ():
            for name, parameter in module._parameters.items():
                if parameter is not None and not f"{path}.{name}".lstrip(".").startswith(names):
                    self.shared[module, name] = getattr(module, name)  # under tensor parallelism, the local part
        self.leaves = [nn.Parameter(value.detach()) for value in self.shared.values()]
        self.rounded: Rounded = ()
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.carries: dict[int, Tensor] = {}
        self.prepared: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.mail = RingMail(ring.group)

    def forward(self, state: Tensor, precomputed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states after and before the last iterations, from initial states and prepared inputs; keep graphs."""
        ring, schedule, rows = self.ring, self.schedule, range(self.rows)
        dtype = self.context.compute_dtype if self.core.rounds_once else None
        self.rounded = ring.weights.gather(dtype, self.with_grad)
        one, stream = (1, *state.shape[1:]), (1, state.shape[1], self.core.config.dim)
        shapes = {"enter": [one, (1, *precomputed.shape[1:])], "hop": [stream], "leave": [one, one]}
        for row in rows:
            self.mail.held["enter", self.first_row + row] = [state[row : row + 1], precomputed[row : row + 1]]
        self.mail.begin(schedule, shapes, state.new_empty(0))
        with torch.no_grad(), self._use_leaves():
            for tick in range(schedule.ticks + 2):
                self.mail.exchange(tick)
                for sequence in schedule.finished_in(tick) if ring.stage == 0 else ():
                    self.mail.held["leave", sequence] = [self._finish(sequence), self.states.pop(sequence)]
                if visit := schedule.visit(ring.stage, tick):
                    has_grad = self._has_grad(visit.sequence, visit.lap)
                    self._trace("forward", tick, visit, has_grad, self._compute)
        self.mail.end()
        if not self.with_grad:
            ring.weights.release()
        last, before = zip(*(self.mail.held.pop(("leave", self.first_row + row)) for row in rows))
        return torch.cat(last), torch.cat(before)

    def _has_grad(self, sequence: int, lap: int) -> bool:
        """Return True if a lap of a sequence carries gradient."""
        return self.with_grad and lap >= self._first_with_grad(sequence)

    def _first_with_grad(self, sequence: int) -> int:
        """Return the first lap of a sequence that carries gradient, where there is any."""
        return self.loops[sequence] - self.counted[sequence]

    def _run(self, key: tuple[int, int], has_grad: bool, function: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """Return `function(*inputs)` without its graph, which is kept under `key` if it carries gradient."""
        if not has_grad:
            return function(*inputs)
        self.graphs[key] = graph = _Graph(function, inputs, self.core.checkpointing.run)
        results, graph.results = graph.results, []
        return results

    def _times(self, sequence: int, lap: int) -> tuple[Tensor, Tensor]:
        """Return iteration index and T of a sequence, (1,) each."""
        device = self.context.tokens.device
        return to_device((lap,), device), to_device((self.loops[sequence],), device)

    def _run_layers(self, x: Tensor, sequence: int, lap: int) -> Tensor:
        """Run this stage's layers."""
        modulations = self.core.signals.modulations(*self._times(sequence, lap))
        with use_rounded(self.rounded):
            for number in self.ring.layers:
                x = self.core.layers[number](x, self.contexts[sequence], None, modulations[number])
        return x

    def _end_iteration(self, carry: Tensor, x: Tensor, sequence: int, lap: int) -> Tensor:
        """Return the state after a lap, on stage 0, from the output of the last layers."""
        return self.core.end_iteration(carry, x, self._times(sequence, lap)[0], self.context.compute_dtype)

    def _compute(self, visit: Visit) -> None:
        """Compute a visit from what has arrived, and leave its result to the next exchange."""
        sequence, lap = visit.sequence, visit.lap
        has_grad = self._has_grad(sequence, lap)

        def begin(state: Tensor, prepared: Tensor) -> Tensors:
            if lap == self.loops[sequence] - 1:
                self.states[sequence] = state.detach()
            x, carry = self.core.begin_iteration(state, self._times(sequence, lap)[0], prepared)
            if not self.core.injection.READS_CARRY:
                carry = x.new_empty(0)  # a state less to keep
            return [self._run_layers(x, sequence, lap), carry]

        def go_on(x: Tensor, carry: Tensor, prepared: Tensor) -> Tensors:
            return begin(self._end_iteration(carry, x, sequence, lap - 1), prepared)

        if self.ring.stage > 0:
            (x,) = self.mail.held.pop(("hop", sequence))
            x = self._run((sequence, lap), has_grad, lambda x: [self._run_layers(x, sequence, lap)], x)[0]
        elif lap == 0:
            state, self.prepared[sequence] = self.mail.held.pop(("enter", sequence))
            x, self.carries[sequence] = self._run((sequence, lap), has_grad, begin, state, self.prepared[sequence])
        else:
            (x,), carry = self.mail.held.pop(("hop", sequence)), self.carries[sequence]
            inputs = (x, carry, self.prepared[sequence])
            if has_grad and not self._has_grad(sequence, lap - 1):
                # Truncation: the state before the first lap with gradient is a constant.
                state = self._end_iteration(carry, x, sequence, lap - 1)
                x, self.carries[sequence] = self._run((sequence, lap), True, begin, state, self.prepared[sequence])
            else:
                x, self.carries[sequence] = self._run((sequence, lap), has_grad, go_on, *inputs)
        self.mail.held["hop", sequence] = [x]

    def _finish(self, sequence: int) -> Tensor:
        """Return the state after the last lap, on stage 0."""
        laps = self.loops[sequence]
        (x,), carry = self.mail.held.pop(("hop", sequence)), self.carries.pop(sequence)
        self.prepared.pop(sequence)

        def end(x: Tensor, carry: Tensor) -> Tensors:
            return [self._end_iteration(carry, x, sequence, laps - 1)]

        return self._run((sequence, laps), self.with_grad, end, x, carry)[0]

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Return the gradients of initial states, prepared inputs and shared weights, from those of the final states."""
        ring, rows = self.ring, range(self.rows)
        schedule = schedule_ring(ring.stages, self.counted, self.owners)
        shapes = self.mail.shapes | {"leave": self.mail.shapes["leave"][:1]}
        for row in rows:
            self.mail.held["leave", self.first_row + row] = [grad[row : row + 1]]
        self.mail.begin(schedule, shapes, grad.new_empty(0), backwards=True)
        with self._use_leaves():
            for tick in reversed(range(schedule.ticks + 2)):
                self.mail.exchange(tick)
                if visit := schedule.visit(ring.stage, tick - 1):
                    counted = Visit(visit.sequence, visit.lap + self._first_with_grad(visit.sequence))
                    self._trace("backward", tick - 1, counted, True, self._go_back)
                for sequence in schedule.finished_in(tick - 1) if ring.stage == 0 else ():
                    self._go_back_to_last_lap(sequence)
        self.mail.end()
        ring.weights.release()
        shared = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        entered = [self.mail.held.pop(("enter", self.first_row + row)) for row in rows]
        return [torch.cat(grads) for grads in zip(*entered)] + shared

    @contextmanager
    def _use_leaves(self) -> Iterator[None]:
        """Put the leaves in the place of the shared weights within."""
        before = {(module, name): module._parameters[name] for module, name in self.shared}
        try:
            for (module, name), leaf in zip(self.shared, self.leaves):
                module._parameters[name] = leaf
            yield
        finally:
            for (module, name), parameter in before.items():
                module._parameters[name] = parameter

    def _pull_back(self, key: tuple[int, int], *grads: Tensor | None) -> list[Tensor | None]:
        """Go back through a graph, which is freed; return the gradients of its inputs."""
        found = self.graphs.pop(key).backward(grads, [*self.ring.weights.whole, *self.leaves])
        self.states.clear()  # a visit that was computed again has left its state once more
        return found

    def _go_back_to_last_lap(self, sequence: int) -> None:
        """Go back, on stage 0, from the state after a sequence's last lap to the output of the last layers."""
        (grad,) = self.mail.held.pop(("leave", sequence))
        x, carry = self._pull_back((sequence, self.loops[sequence]), grad)
        assert x is not None
        self.mail.held["hop", sequence] = [x]
        if carry is not None:
            self.carries[sequence] = carry

    def _go_back(self, visit: Visit) -> None:
        """Go back through a visit; on stage 0 also add up the gradient of the prepared input."""
        sequence, lap = visit.sequence, visit.lap
        (grad,) = self.mail.held.pop(("hop", sequence))
        if self.ring.stage > 0:
            (x,) = self._pull_back((sequence, lap), grad)
            assert x is not None
            self.mail.held["hop", sequence] = [x]
            return
        graph = self.graphs[sequence, lap]
        *_, leaf = graph.inputs
        first, *middle, prepared = self._pull_back((sequence, lap), grad, self.carries.pop(sequence, None))
        if prepared is None:  # an injection that does not read the encoded input
            prepared = torch.zeros_like(leaf)
        if sequence in self.prepared:
            prepared += self.prepared[sequence]
        self.prepared[sequence] = prepared
        assert first is not None
        if lap > self._first_with_grad(sequence):
            self.mail.held["hop", sequence] = [first]
            if middle[0] is not None:
                self.carries[sequence] = middle[0]
            return
        initial = first if lap == 0 else torch.zeros_like(first)  # a truncated loop does not reach its initial state
        self.mail.held["enter", sequence] = [initial, self.prepared.pop(sequence)]

    def _trace(self, phase: str, tick: int, visit: Visit, has_grad: bool, compute: Callable[[Visit], None]) -> None:
        """Call `compute` with the visit, and record when it ran if a trace is wanted."""
        if self.ring.trace is None:
            compute(visit)
            return
        begin = time.monotonic()
        compute(visit)
        traced = TracedVisit(phase, tick, self.ring.stage, visit, has_grad, begin, time.monotonic())
        self.ring.trace.append(traced)
