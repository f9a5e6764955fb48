"""The recurrent core: one set of layers, applied T times to a state, with the encoded input injected every time.

    h_0     = initial state
    h_(t+1) = layers(inject(h_t, norm(e)))        t = 0 ... T - 1

The first T - k iterations run without gradient, the last k with it (truncated backpropagation through depth).
The loop is inside one module on purpose: a sharding engine that treats this module as one unit gathers its
weights once, whatever T is.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.plan import CoreIteration, DepthPlan
from megatron_rdt.model.activation_checkpointing import Checkpointing
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.halting.trained import ActTracker, GateTracker, HaltingUnit, make_tracker
from megatron_rdt.model.injection import Injection
from megatron_rdt.model.iteration_signals import Signals
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import IdentityLinear, Rounded, round_weights, use_rounded
from megatron_rdt.model.monitor import CoreMonitor, top_singular_values
from megatron_rdt.model.norm import RMSNorm
from megatron_rdt.model.transfer import to_device


class LoopRunner(Protocol):
    """Replaces the core's own loop over iterations, as `AdaptiveLoop` does for exit rules."""

    def run(self, core: "RecurrentCore", state: Tensor, inputs: LoopInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the same as `RecurrentCore.forward`, from the expanded initial state (batch, sequence, ...)."""


class StateRing(Protocol):
    """Runs the iterations where other processes hold other layers of the core: states travel, weights stay."""

    def run(
        self, core: "RecurrentCore", state: Tensor, precomputed: Tensor, context: LayerContext, plan: DepthPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the expanded states (batch, sequence, ...) after and, without gradient, before each last iteration.

        Args:
            core: whose layers are called.
            state: the expanded initial state.
            precomputed: from `RecurrentCore.precompute`.
            context: rotary tables, mask, compute dtype and tokens of this process's sequences.
            plan: T of each sequence, of every process of the ring, and k.
        """


class LoopProgress:
    """The loop after some iterations, from which it goes on to a larger T; without gradient, one T for all sequences.

    A plain class, not a tuple or dataclass, so that sharding wrappers pass it through untouched.

    Attributes:
        completed: number of iterations; 0 before the first.
        inputs: of every iteration.
        state: the expanded state after them.
        tracker: of trained halting; None without it.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.inputs: LoopInputs | None = None
        self.state: Tensor | None = None
        self.tracker: ActTracker | GateTracker | None = None


class RecurrentCore(nn.Module):
    """`core_layers` layers and an injection, iterated.

    Attributes:
        checkpointing: decides what is kept for the backward pass, and how many iterations make one segment.
        rounds_once: round the layers' matrices to the compute dtype once per pass, and keep them until its gradients are
            computed; set where the layers' weights are all there when the pass begins.
        ring: runs the iterations where this process has some of the layers only; None where it has all.
        compiled: runs instead of `run_iteration` in training without a cache, where the layers are nothing but parts of the
            core; None where nothing is compiled.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoded_norm = RMSNorm(config.dim, config.norm_eps) if config.encoded_norm else None
        self.input_matrix = IdentityLinear(config.dim) if config.input_matrix else None
        self.initial = nn.Parameter(torch.empty(config.dim)) if config.state_init == "learned" else None
        self.injection = Injection.choices[config.injection](config)
        self.signals = Signals(config)
        first = config.prelude_layers
        self.layers = nn.ModuleList(Layer(config, first + i, core=True) for i in range(config.core_layers))
        self.iteration_norm = RMSNorm(config.dim, config.norm_eps) if config.core_norm == "iteration" else None
        self.last_norm = RMSNorm(config.dim, config.norm_eps) if config.core_norm == "last" else None
        self.output_matrix = IdentityLinear(config.dim) if config.output_matrix else None
        self.halting = HaltingUnit(config) if config.halting != "none" else None
        self.checkpointing = Checkpointing()
        self.rounds_once = False
        self.ring: StateRing | None = None
        self.compiled: Callable[[Tensor, Tensor, LoopInputs], Tensor] | None = None

    def iterate(self, state: Tensor, t: Tensor, inputs: LoopInputs, slot: int = 0) -> Tensor:
        """Run one iteration, compiled as set, and return the next state.

        Args:
            state: expanded state, (batch, sequence, ...).
            t: (batch,) iteration index of each sequence, from 0.
            inputs: of these sequences.
            slot: cache slot of the first layer in this iteration.
        """
        if self.compiled is not None and self.training and inputs.context.cache is None and self._is_one_unit():
            return self.compiled(state, t, inputs)
        return self.run_iteration(state, t, inputs, slot)

    def _is_one_unit(self) -> bool:
        """Return True if nothing hooks into the layers: checkpoints, exchanges of experts, or what gathers weights."""
        has_experts = self.config.core_ffn == "moe"
        return not has_experts and not any(layer.checkpointed or layer._forward_pre_hooks for layer in self.layers)

    def run_iteration(self, state: Tensor, t: Tensor, inputs: LoopInputs, slot: int = 0) -> Tensor:
        """Do what `iterate` does, layer by layer."""
        x, carry = self.begin_iteration(state, t, inputs.precomputed)
        modulations = self.signals.modulations(t, inputs.loops)
        for i, layer in enumerate(self.layers):
            x = layer(x, inputs.context.at_slot(slot + i), inputs.token_values[i], modulations[i])
        return self.end_iteration(carry, x, t, inputs.context.compute_dtype)

    def begin_iteration(self, state: Tensor, t: Tensor, precomputed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the first layer, (batch, sequence, dim), and the carry for `end_iteration`."""
        return self.injection("inject", state, precomputed, self.signals.offset(t))

    def end_iteration(self, carry: Tensor, x: Tensor, t: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return the next expanded state from the output of the last layer, (batch, sequence, dim)."""
        x = self.signals.adapt(x, t, compute_dtype)
        x = x if self.iteration_norm is None else self.iteration_norm(x)
        return self.injection("update", carry, x)

    def forward(
        self,
        state: Tensor,
        encoded: Tensor,
        plan: DepthPlan,
        context: LayerContext,
        kept: int,
        monitor: CoreMonitor | None = None,
        runner: LoopRunner | None = None,
        progress: LoopProgress | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the loop; return the coda's input (batch, sequence, dim), and what halting or the runner adds to it.

        Args:
            state: initial state, (batch, sequence, dim), float32 or wider.
            encoded: output of the prelude, the same shape.
            plan: T of each sequence, and k.
            context: rotary tables, mask, compute dtype, and the first cache slot of the loop.
            kept: number of iterations with cache slots of their own; iteration t uses those of t mod `kept`.
            monitor: receives the measurements that it asks for; they change nothing.
            runner: runs the iterations instead.
            progress: of an earlier call with the same inputs and a smaller T, whose iterations are not run again; it receives
                those of this call. Nothing may depend on T itself, see `Signals.depend_on_loops`.

        Returns:
            The state after each sequence's last iteration, (batch, sequence, dim), and a dictionary with the results of
            trained halting, empty without it.
        """
        if self.ring is not None and runner is None and context.cache is None and context.states is None:
            return self._run_ring(self.ring, state, encoded, plan, context, monitor), {}
        reached = progress or LoopProgress()
        inputs = self.loop_inputs(encoded, plan, context) if reached.inputs is None else reached.inputs
        if not plan.is_uniform:
            if context.states is not None:
                raise ValueError("hidden states are for one T; these sequences have several")
            # Largest T first, so that the sequences of every iteration are the first rows: a slice, no gather.
            order = to_device(plan.order, state.device)
            state, inputs = state[order], inputs.rows(order)
        initial = self.injection("expand", state if self.initial is None else self.initial.expand_as(state))
        waits = self.checkpointing.policy == "none"
        rounded = round_weights(self.layers, context.compute_dtype, waits) if self.rounds_once else ()
        if runner is not None:
            with use_rounded(rounded):
                return runner.run(self, initial, inputs)
        tracker = reached.tracker or make_tracker(self.halting, self.config)
        # Without progress no sequence has started yet.
        state, completed = initial[:0] if reached.state is None else reached.state, reached.completed
        for segment in self.checkpointing.segments(islice(plan.core_iterations(), completed, None)):
            active = len(segment[0].indices)
            # Truncation: T - k iterations leave no graph behind, so what they computed enters the rest as a constant.
            with torch.set_grad_enabled(torch.is_grad_enabled() and segment[0].with_grad):
                # Sequences with a smaller T join later, so that all end together and share the last k iterations.
                state = torch.cat((state, initial[len(state) : active])) if active > len(state) else state
                # A cache comes with one T for all sequences, so the first one's index is everyone's.
                slots = [context.slot + i.indices[0] % kept * len(self.layers) for i in segment]
                states = self._run_segment(segment, state, inputs, slots, rounded)
                for iteration, after in zip(segment, states):
                    completed, previous, state = completed + 1, state, after
                    if context.states is not None:
                        context.record_state(self.injection("collapse", state))
                    if tracker is not None:
                        is_last, collapsed = completed == plan.max_loops, self.injection("collapse", state)
                        if is_last and progress is not None:
                            # Every token stops in the last iteration, but not if the loop goes on.
                            reached.tracker = copy.copy(tracker)
                            reached.tracker.update(collapsed, last=False)
                        tracker.update(collapsed, last=is_last)
                    if monitor is not None and monitor.per_iteration:
                        self._measure_iteration(monitor, iteration.indices, previous, state)
        if monitor is not None:
            self._measure_last(monitor, iteration.indices, previous, state, inputs)
        reached.completed, reached.inputs, reached.state = completed, inputs, state
        state, extras = (self.injection("collapse", state), {}) if tracker is None else tracker.result()
        if not plan.is_uniform:
            inverse = order.argsort()
            state, extras = state[inverse], {name: value[inverse] for name, value in extras.items()}
        state = self._connected_coda_input(state, encoded)
        if "states" in extras:  # of every iteration: the exit gate's loss reads them all
            extras["states"] = self._connected_coda_input(extras["states"], encoded)
        return state, extras

    def _run_ring(
        self,
        ring: StateRing,
        state: Tensor,
        encoded: Tensor,
        plan: DepthPlan,
        context: LayerContext,
        monitor: CoreMonitor | None,
    ) -> Tensor:
        """Run every iteration in a loop ring; return the coda's input, (batch, sequence, dim)."""
        initial = self.injection("expand", state if self.initial is None else self.initial.expand_as(state))
        expanded, before = ring.run(self, initial, self.precompute(encoded), context, plan)
        state = self.injection("collapse", expanded)
        if monitor is not None:
            indices = tuple(plan.iterations[i] - 1 for i in plan.order)
            order = to_device(plan.order, state.device)
            with torch.no_grad():
                previous = self.injection("collapse", before)[order]
                monitor.measure_last(indices, previous, state[order], self.injection.spectral_radius())
        return self._connected_coda_input(state, encoded)

    def _run_segment(
        self, segment: Sequence[CoreIteration], state: Tensor, inputs: LoopInputs, slots: list[int], rounded: Rounded
    ) -> list[Tensor]:
        """Run a segment's iterations on its sequences, the first rows of `inputs`; return the state after each.

        With gradient the segment is one unit of activation checkpointing.
        """
        times = [to_device(iteration.indices, state.device) for iteration in segment]
        active = len(segment[0].indices)
        # A slice, even of everything, would cost a copy in every iteration's backward pass.
        part = inputs if active == len(inputs.loops) else inputs.rows(slice(active))

        def iterate_all(state: Tensor, part: LoopInputs) -> list[Tensor]:
            states = []
            with use_rounded(rounded):  # here, since activation checkpointing may call this again in the backward pass
                for t, slot in zip(times, slots):
                    state = self.iterate(state, t, part, slot)
                    states.append(state)
            return states

        if torch.is_grad_enabled() and inputs.context.cache is None:
            return self.checkpointing.run(iterate_all, state, part)
        return iterate_all(state, part)

    def loop_inputs(self, encoded: Tensor, plan: DepthPlan, context: LayerContext) -> LoopInputs:
        """Compute once what every iteration reads: the injection's part of the encoded input, T, the value embeddings."""
        loops = to_device(plan.iterations, encoded.device)
        values = [layer.token_values(context) for layer in self.layers]  # type: ignore[operator]
        return LoopInputs(self.precompute(encoded), context, loops, values)

    def precompute(self, encoded: Tensor) -> Tensor:
        """Return the injection's part of the encoded input, (batch, sequence, ..., dim), which every iteration reads."""
        if self.encoded_norm is not None:
            encoded = self.encoded_norm(encoded)
        if self.input_matrix is not None:
            encoded = self.input_matrix(encoded)
        return self.injection("precompute", encoded)

    def coda_input(self, state: Tensor) -> Tensor:
        """Apply the norm and the matrix at the end of the loop, where the config has them: (..., dim) -> (..., dim)."""
        if self.last_norm is not None:
            state = self.last_norm(state)
        return state if self.output_matrix is None else self.output_matrix(state)

    def _connected_coda_input(self, state: Tensor, encoded: Tensor) -> Tensor:
        """Return `coda_input`, with what only the initial state reads kept in the graph where truncation cuts it off.

        The gradient is zero then, but it exists: ranks must reduce the same parameters.
        """
        if self.initial is not None:
            state = state + 0 * self.initial
        if not self.injection.READS_ENCODED:
            state = state + 0 * encoded
        return self.coda_input(state)

    @torch.no_grad()
    def _measure_iteration(
        self, monitor: CoreMonitor, indices: tuple[int, ...], previous: Tensor, state: Tensor
    ) -> None:
        """Measure an iteration that went from `previous` to `state`, and later the gradient that arrives at `state`."""
        monitor.watch_gradient(indices, state)
        monitor.measure_iteration(indices, self.injection("collapse", previous), self.injection("collapse", state))

    @torch.no_grad()
    def _measure_last(
        self, monitor: CoreMonitor, indices: tuple[int, ...], previous: Tensor, state: Tensor, inputs: LoopInputs
    ) -> None:
        """Let the monitor measure the last iteration and, if it asks for them, the input term and the Jacobian."""
        collapsed = self.injection("collapse", previous), self.injection("collapse", state)
        monitor.measure_last(indices, *collapsed, self.injection.spectral_radius())
        if monitor.per_iteration:
            monitor.measure_input(self.injection.input_term(inputs.precomputed))
        if monitor.jacobian_steps and inputs.context.cache is None:
            t = to_device(indices, state.device)
            monitor.jacobian_norm = self.jacobian_norm(previous, t, inputs, monitor.jacobian_steps).max()

    def jacobian_norm(self, state: Tensor, t: Tensor, inputs: LoopInputs, steps: int) -> Tensor:
        """Return a lower bound of the Jacobian's largest singular value for iteration t at `state`: (batch,).

        See `top_singular_values` for `steps`. Products are in the dtype of the state: the differences would be nothing but
        rounding in bfloat16.
        """
        values = [None if value is None else value.detach() for value in inputs.token_values]
        context = inputs.context.in_dtype(state.dtype)
        wide = LoopInputs(inputs.precomputed.detach(), context, inputs.loops, values)
        training = self.training
        self.eval()  # these are extra evaluations: experts must not count their tokens, nor compiled layers run
        try:
            return top_singular_values(lambda h: self.iterate(h, t, wide), state, steps)
        finally:
            self.train(training)
