"""The recurrent core: one set of layers, applied T times to a state, with the encoded input injected every time.

    h_0     = initial state
    h_(t+1) = layers(inject(h_t, norm(e)))        t = 0 ... T - 1

The first T - k iterations run without gradient, the last k with it (truncated backpropagation through depth).
The loop lives inside one module on purpose: a sharding engine that treats this module as one unit gathers its
weights once, whatever T is.
"""

from typing import Protocol

import torch
from torch import nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.activation_checkpointing import Checkpointing
from megatron_rdt.model.attention.kv_cache import KeyValueCache
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.halting.trained import HaltingUnit, make_tracker
from megatron_rdt.model.injection import Injection
from megatron_rdt.model.iteration_signals import Signals
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import IdentityLinear
from megatron_rdt.model.monitor import CoreMonitor, top_singular_values
from megatron_rdt.model.norm import RMSNorm
from megatron_rdt.model.transfer import to_device


class LoopRunner(Protocol):
    """Runs the iterations of a pass in a way of its own."""

    def run(
        self, core: "RecurrentCore", state: torch.Tensor, inputs: LoopInputs, first_slot: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What `RecurrentCore.forward` returns, from the opened state, (batch, sequence, ...)."""


class RecurrentCore(nn.Module):
    """`core_layers` layers and an injection, iterated.

    Attributes:
        checkpointing: what is kept for the backward pass, and how many iterations are run at a time.
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

    def iterate(
        self,
        state: torch.Tensor,
        t: torch.Tensor,
        inputs: LoopInputs,
        cache: KeyValueCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """One iteration, the t-th (from 0) of each sequence: the next state; t has shape (batch,)."""
        x, carry = self.injection.inject(state, inputs.precomputed, self.signals.offset(t))
        modulations = self.signals.modulations(t, inputs.total)
        for i, layer in enumerate(self.layers):
            modulation = None if modulations is None else modulations[i]
            x = layer(x, inputs.context, cache, slot + i, inputs.token_values[i], modulation)
        x = self.signals.adapt(x, t, inputs.context.compute_dtype)
        x = x if self.iteration_norm is None else self.iteration_norm(x)
        return self.injection.update(carry, x)

    def forward(
        self,
        state: torch.Tensor,
        encoded: torch.Tensor,
        plan: DepthPlan,
        context: LayerContext,
        cache: KeyValueCache | None = None,
        first_slot: int = 0,
        monitor: CoreMonitor | None = None,
        runner: LoopRunner | None = None,
        budget: int = 0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the loop.

        Args:
            state: initial state, (batch, sequence, dim), float32 or wider.
            encoded: output of the prelude, the same shape.
            plan: T of each sequence, and k.
            context: rotary tables, mask, compute dtype.
            cache: keys and values of earlier positions; iteration t uses slots first_slot + t * layers ...
            first_slot: first cache slot of the loop.
            monitor: receives the measurements that it asks for; they change nothing.
            runner: runs the iterations instead; it has a cache of its own.
            budget: iteration t uses the cache slots of t mod budget; 0 means of t.

        Returns:
            The state after each sequence's last iteration, (batch, sequence, dim), and what trained halting adds.
        """
        inputs = self.loop_inputs(encoded, plan, context)
        if not plan.is_uniform:  # the deepest first: a pass takes the sequences that need it from the top
            order = to_device(plan.order, state.device)
            state, inputs = state[order], inputs.rows(order)
        initial = self.injection.expand(state if self.initial is None else self.initial.expand_as(state))
        if runner is not None:
            return runner.run(self, initial, inputs, first_slot)
        slots = budget or plan.max_loops
        tracker = make_tracker(self.halting, self.config)
        state, number = initial[:0], 0
        for iterations in self.checkpointing.segments(plan.core_iterations()):
            active = len(iterations[0].indices)
            with torch.set_grad_enabled(torch.is_grad_enabled() and iterations[0].with_grad):
                state = torch.cat((state, initial[len(state) : active])) if active > len(state) else state
                places = [first_slot + iteration.indices[0] % slots * len(self.layers) for iteration in iterations]
                states = self._advance(state, [iteration.indices for iteration in iterations], inputs, cache, places)
                for iteration, reached in zip(iterations, states):
                    number, previous, state = number + 1, state, reached
                    if tracker is not None:
                        tracker.update(self.injection.collapse(state), last=number == plan.max_loops)
                    if monitor is not None and monitor.per_iteration:
                        self._measure_iteration(monitor, iteration.indices, previous, state)
        if monitor is not None:
            self._measure_last(monitor, iteration.indices, previous, state, inputs, cached=cache is not None)
        state, extras = (self.injection.collapse(state), {}) if tracker is None else tracker.result()
        if not plan.is_uniform:
            back = order.argsort()
            state, extras = state[back], {name: value[back] for name, value in extras.items()}
        return self._leave(state), {name: self._leave(v) if name == "states" else v for name, v in extras.items()}

    def _advance(
        self,
        state: torch.Tensor,
        indices: list[tuple[int, ...]],
        inputs: LoopInputs,
        cache: KeyValueCache | None,
        slots: list[int],
    ) -> list[torch.Tensor]:
        """The states after each of some iterations of the same first sequences, the indices-th of each (from 0)."""
        times, active = [to_device(each, state.device) for each in indices], len(indices[0])
        # A slice, even of everything, would cost a copy in every iteration's backward pass.
        part = inputs if active == len(inputs.total) else inputs.rows(slice(active))

        def iterations(state: torch.Tensor, part: LoopInputs) -> list[torch.Tensor]:
            states = []
            for t, slot in zip(times, slots):
                state = self.iterate(state, t, part, cache, slot)
                states.append(state)
            return states

        if torch.is_grad_enabled() and cache is None:
            return self.checkpointing.run(iterations, state, part)
        return iterations(state, part)

    def _leave(self, state: torch.Tensor) -> torch.Tensor:
        """What the coda reads of the last state, or of every iteration's."""
        if self.initial is not None:  # a gradient, if zero, also where truncation cuts it off: ranks reduce the same
            state = state + 0 * self.initial
        return self.finish(state)

    @torch.no_grad()
    def _measure_iteration(
        self, monitor: CoreMonitor, indices: tuple[int, ...], previous: torch.Tensor, state: torch.Tensor
    ) -> None:
        monitor.watch_gradient(indices, state)
        monitor.measure_iteration(indices, self.injection.collapse(previous), self.injection.collapse(state))

    @torch.no_grad()
    def _measure_last(
        self,
        monitor: CoreMonitor,
        indices: tuple[int, ...],
        previous: torch.Tensor,
        state: torch.Tensor,
        inputs: LoopInputs,
        cached: bool,
    ) -> None:
        """What is measured once a pass, of its last iteration."""
        closed = self.injection.collapse(previous), self.injection.collapse(state)
        monitor.measure(*closed, self.injection.spectral_radius())
        if monitor.per_iteration:
            monitor.measure_input(self.injection.input_term(inputs.precomputed))
        if monitor.jacobian_steps and not cached:
            t = to_device(indices, state.device)
            monitor.jacobian_norm = self.jacobian_norm(previous, t, inputs, monitor.jacobian_steps).max()

    def jacobian_norm(self, state: torch.Tensor, t: torch.Tensor, inputs: LoopInputs, steps: int) -> torch.Tensor:
        """Largest singular value of the t-th iteration's Jacobian at `state`, of each sequence: (batch,).

        A lower bound, see `top_singular_values`. Products are in the dtype of the state: in bfloat16 the differences
        would be rounding.
        """
        values = [None if value is None else value.detach() for value in inputs.token_values]
        context = inputs.context.in_dtype(state.dtype)
        wide = LoopInputs(inputs.precomputed.detach(), context, inputs.total, values)
        training = self.training
        self.eval()  # this is no training: experts do not count these tokens
        try:
            return top_singular_values(lambda h: self.iterate(h, t, wide), state, steps)
        finally:
            self.train(training)

    def loop_inputs(self, encoded: torch.Tensor, plan: DepthPlan, context: LayerContext) -> LoopInputs:
        """What is computed once for all iterations."""
        if self.encoded_norm is not None:
            encoded = self.encoded_norm(encoded)
        if self.input_matrix is not None:
            encoded = self.input_matrix(encoded)
        total = to_device(plan.iterations, encoded.device)
        values = [layer.token_values(context) for layer in self.layers]  # type: ignore[operator]
        return LoopInputs(self.injection.precompute(encoded), context, total, values)

    def finish(self, state: torch.Tensor) -> torch.Tensor:
        """What the coda reads of the last state."""
        if self.last_norm is not None:
            state = self.last_norm(state)
        return state if self.output_matrix is None else self.output_matrix(state)
