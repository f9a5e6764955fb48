"""The recurrent core: one set of layers, applied T times to a state, with the encoded input injected every time.

    h_0     = initial state
    h_(t+1) = layers(inject(h_t, norm(e)))        t = 0 ... T - 1

The first T - k iterations run without gradient, the last k with it (truncated backpropagation through depth).
The loop lives inside one module on purpose: a sharding engine that treats this module as one unit gathers its
weights once, whatever T is.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.attention import KeyValueCache
from megatron_rdt.model.context import CoreMonitor, LayerContext
from megatron_rdt.model.injection import INJECTIONS
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.norm import RMSNorm


class RecurrentCore(nn.Module):
    """`core_layers` layers and an injection, iterated.

    Attributes:
        checkpoint_iterations: keep only the state between iterations and recompute the inside in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoded_norm = RMSNorm(config.dim, config.norm_eps)
        self.injection = INJECTIONS[config.injection](config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.core_layers))
        self.checkpoint_iterations = False

    def iterate(
        self,
        state: torch.Tensor,
        encoded: torch.Tensor,
        context: LayerContext,
        cache: KeyValueCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """One iteration: (batch, sequence, dim) -> (batch, sequence, dim)."""
        state = self.injection(state, encoded)
        for offset, layer in enumerate(self.layers):
            state = layer(state, context, cache, slot + offset)
        return state

    def forward(
        self,
        state: torch.Tensor,
        encoded: torch.Tensor,
        plan: DepthPlan,
        context: LayerContext,
        cache: KeyValueCache | None = None,
        first_slot: int = 0,
        monitor: CoreMonitor | None = None,
    ) -> torch.Tensor:
        """Run the loop.

        Args:
            state: initial state, (batch, sequence, dim), float32 or wider.
            encoded: output of the prelude, the same shape.
            plan: T and k.
            context: rotary tables, mask, compute dtype.
            cache: keys and values of earlier positions; iteration t uses slots first_slot + t * layers ...
            first_slot: first cache slot of the loop.
            monitor: receives the measurements of the last iteration.

        Returns:
            The state after T iterations.
        """
        encoded = self.encoded_norm(encoded)
        previous = state
        for t in range(plan.loops):
            previous, slot = state, first_slot + t * len(self.layers)
            with_grad = torch.is_grad_enabled() and t >= plan.loops - plan.loops_with_grad
            with torch.set_grad_enabled(with_grad):
                if with_grad and self.checkpoint_iterations:
                    # The reentrant kind gives wrong gradients under sharding, without an error.
                    state = checkpoint(self.iterate, state, encoded, context, use_reentrant=False)
                else:
                    state = self.iterate(state, encoded, context, cache, slot)
        if monitor is not None:
            monitor.measure(previous, state, self.injection.spectral_radius())
        return state
