"""Time and number of the kernels of a training step on one device, from the config alone.

Each matrix product takes the larger of two times, its FLOPs and its bytes at the rates that a device attains; attention that
of its FLOPs. What weights and gradients move is counted: rounding, sums over iterations and micro-batches, clipping, the
optimizer. All other kernels, norms and sums and activation functions, move a multiple of the bytes that their part of the
model keeps for the backward pass (`TRAFFIC`). That multiple and the number of kernels of a layer are fitted to the counts of
`benchmarks/roofline.py`, which lists every kernel of real steps; it prints this module's figures beside them, and
tests/test_roofline.py holds them together.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device, attained_rates
from megatron_rdt.model.cross_entropy import count_chunk_tokens
from megatron_rdt.model.flops import attention_flops
from megatron_rdt.planner.activations import injection_kept_bytes, layer_kept_bytes
from megatron_rdt.planner.parameters import CORE, Parameter, list_parameters, moments_per_weight
from megatron_rdt.planner.recomputation import CheckpointingPolicy
from megatron_rdt.planner.shape import FLOAT32, Shape

LAUNCH_SECONDS = 6e-6  # of a kernel, by the host
ATTENTION_BACKWARD = 2.5  # five products where the forward pass has two: flash attention computes scores again
# Bytes per number: rounding to bfloat16 (read 4, write 2), adding to a sum (read 8, write 4), a moment or weight that an
# optimizer updates, or a gradient that is scaled (read and write 4).
ROUND, ADD, UPDATE = 6, 12, 8
# What rounding to float8 adds per number of a product's left factor; kernels per product, some of which share a factor. Fitted.
FLOAT8_ROUND, FLOAT8_KERNELS = 3, 0.7
NOISE = 308  # bytes moved per number of a drawn initial state: about 27 operators of hashing and of the normal quantile


@dataclass(frozen=True)
class Traffic:
    """Bytes that kernels besides products and attention move, and the number of them, compiled or not.

    Attributes:
        forward, backward: bytes moved per byte that a part of the model keeps for the backward pass.
        logit: bytes moved per logit by the loss.
        layer: kernels of a layer in each pass, by kind of attention.
    """

    forward: float
    backward: float
    logit: float
    layer: dict[str, tuple[int, int]]


# By `train.compile`. Of a mixture of experts only a part is compiled, and then not what an iteration does besides its layers.
UNCOMPILED = Traffic(2.6, 4.2, 26, {"gqa": (27, 36), "mla": (42, 65)})
TRAFFIC = {"none": UNCOMPILED, "layers": Traffic(0.9, 2.0, 4, {"gqa": (5, 11), "mla": (5, 11)})}
MIXTURE = Traffic(1.5, 2.5, 4, TRAFFIC["layers"].layer)
# Kernels, in each pass, of a mixture, and of an iteration: a decay is made anew, signals and halting are small products.
EXPERT_KERNELS, SIGNAL_KERNELS, PASS_KERNELS, STEP_KERNELS = 31, 15, 110, 20
INJECTION_KERNELS = {"diagonal": 30, "residual": 30, "hyper": 30}
OTHER_INJECTION_KERNELS = 3
HALTING_KERNELS = {"act": 23, "gate": 23}
FUSED_ITERATION_KERNELS = 3  # of an iteration that is one graph, besides those of its layers


@dataclass(frozen=True)
class Cost:
    """Seconds on the device, and kernels started by the host."""

    seconds: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Return both together."""
        return Cost(self.seconds + other.seconds, self.kernels + other.kernels)

    def __mul__(self, times: float) -> "Cost":
        """Return the cost of so many."""
        return Cost(self.seconds * times, self.kernels * times)


def _moved(traffic: Traffic, backward: bool) -> float:
    """Return the bytes moved in a pass per byte kept."""
    return traffic.backward if backward else traffic.forward


class StepKernels:
    """The kernels of one process's parts of a step.

    Args:
        config: the run's config.
        layout: layout of its processes.
        device: kind of device.
        expert_load: rows of the busiest process's experts, as a multiple of the mean.
    """

    def __init__(self, config: RunConfig, layout: Layout, device: Device, expert_load: float = 1.0) -> None:
        self.config, self.model, self.layout, self.expert_load = config, config.model, layout, expert_load
        self.rates, self.shape = attained_rates(device), Shape.of(config, layout, device.is_gpu)
        self.traffic = TRAFFIC[config.train.compile]
        self.policy = CheckpointingPolicy(config.depth.checkpoint)
        self._outside: dict[bool, dict[str, Cost]] = {}
        self.units: dict[str, list[Parameter]] = {}
        for parameter in list_parameters(config.model):
            name = parameter.name
            unit = ".".join(name.split(".")[:3]) if name.startswith("core.layers.") else parameter.unit
            self.units.setdefault(unit, []).append(parameter)

    def _move(self, size: float, kernels: float = 0.0) -> Cost:
        """Return the cost of kernels that only move bytes."""
        return Cost(size / self.rates.memory, kernels)

    def _is_wide(self, parameter: Parameter) -> bool:
        """Return True for a matrix whose products are in float32: those of the core outside its layers, and routers."""
        outside = parameter.unit == CORE and not parameter.name.startswith("core.layers.")
        return outside or parameter.name.endswith("router") or self.shape.element_bytes == FLOAT32

    def _is_float8(self, parameter: Parameter) -> bool:
        """Return True for a matrix that multiplies inputs and their gradients in float8."""
        if self.config.train.float8 == "none" or self._is_wide(parameter) or len(parameter.shape) != 2:
            return False
        return (
            any(part in parameter.name for part in (".attention.", ".feedforward."))
            and "token_values" not in parameter.name
        )

    def _products(self, parameter: Parameter, backward: bool) -> Cost:
        """Return the cost of one use of a matrix, or of one expert's matrices: x W^T, or the gradients of x and W."""
        *experts, outputs, inputs = parameter.local_shape(self.layout)
        rows = float(self.shape.tokens)
        if experts:
            tokens = self.shape.stream_tokens if self.layout.expert > 1 else self.shape.tokens
            rows = tokens * self.model.experts_per_token * self.expert_load
        wide = self._is_wide(parameter)
        element = FLOAT32 if wide else self.shape.element_bytes
        rate = self.rates.tf32_products if wide else self.rates.products
        flops, matrix = 2 * rows * inputs * outputs, float(inputs * outputs * (experts[0] if experts else 1))
        ends = element * rows * (inputs + outputs)
        first = max(flops / rate, (ends + element * matrix) / self.rates.memory)
        kernels = 1.0
        if self._is_float8(parameter):
            kernels += FLOAT8_KERNELS
            left = rows * (outputs if backward else inputs)
            first = max(flops / self.rates.float8_products, (ends + matrix) / self.rates.memory)
            first += FLOAT8_ROUND * left / self.rates.memory
        if not backward:
            return Cost(first, kernels)
        gradient = element if experts else FLOAT32  # a grouped product's is rounded, then widened
        second = max(flops / rate, (ends + gradient * matrix) / self.rates.memory)
        if experts and self._sums_in_place and self.policy.name == "none":
            # The rows are moved together, for one product at the end.
            return Cost(first + second, 2) + self._move(2 * ends, 2)
        widened = self._move(ROUND * matrix, 1) if experts and not wide else Cost()
        return Cost(first + second, 1 + kernels) + widened

    def _matrices(self, unit: str) -> list[Parameter]:
        """List the matrices of a unit that multiply each token."""
        skipped = ("token_values.weight", "embedding.weight")
        return [p for p in self.units.get(unit, ()) if len(p.shape) > 1 and not p.name.endswith(skipped)]

    def layer(self, unit: str, index: int, backward: bool) -> Cost:
        """Return the cost of a pass through a layer: its index among all layers, backward or forward.

        Rounding is counted for layers outside the core, which round at every use.
        """
        core, tokens = unit.startswith(CORE), self.shape.tokens
        matrices = self._matrices(unit)
        cost = sum((self._products(p, backward) for p in matrices), Cost())
        flops = attention_flops(self.model, self.config.train.sequence_length) * tokens / self.layout.tensor
        cost += Cost(flops * (ATTENTION_BACKWARD if backward else 1) / self.rates.attention, 1)
        mixture = core and self.model.core_ffn == "moe"
        kernels = self.traffic.layer[self.model.attention][backward] + mixture * EXPERT_KERNELS
        kept = sum(layer_kept_bytes(self.shape, index, core))
        traffic = MIXTURE if mixture and self.traffic is not UNCOMPILED else self.traffic
        cost += self._move(_moved(traffic, backward) * kept, kernels)
        if not core and self.shape.element_bytes < FLOAT32:
            cost += self._move(ROUND * sum(p.local_size(self.layout) for p in matrices), len(matrices))
        return cost

    def _core_layers(self, backward: bool) -> Cost:
        """Return the cost of a pass through the core's layers."""
        first = self.model.prelude_layers
        layers = (self.layer(f"core.layers.{i}", first + i, backward) for i in range(self.model.core_layers))
        return sum(layers, Cost())

    @cached_property
    def iteration_forward(self) -> Cost:
        """Cost of an iteration's forward pass."""
        cost = self._core_layers(False) + sum((self._products(p, False) for p in self._per_iteration), Cost())
        return cost + self._move(self._iteration_traffic.forward * self._iteration_bytes, self._iteration_kernels)

    @cached_property
    def iteration_backward(self) -> Cost:
        """Cost of an iteration's backward pass, with what is recomputed, without the sums over iterations."""
        cost = self._core_layers(True) + sum((self._products(p, True) for p in self._per_iteration), Cost())
        cost += self._move(self._iteration_traffic.backward * self._iteration_bytes, self._iteration_kernels)
        return cost + self.iteration_forward * self.policy.recomputed_share

    def loop(self, times: float, backward: bool) -> Cost:
        """Return the cost of `times` iterations; gradients of all but the first to go backward are added to a sum."""
        if not backward:
            return self.iteration_forward * times
        core = [p for unit, group in self.units.items() if unit.startswith(CORE) for p in group]
        if self._sums_in_place:
            core = [p for p in core if not p.is_rounded_once]
        added = self._move(ADD * sum(p.local_size(self.layout) for p in core), len(core))
        return self.iteration_backward * times + added * max(times - 1, 0.0)

    @property
    def _sums_in_place(self) -> bool:
        """True if products add to the sums of the core's weight gradients themselves."""
        return self.shape.element_bytes < FLOAT32 and self.config.parallel.core_gather == "once"

    @property
    def _per_iteration(self) -> list[Parameter]:
        """Matrices of the core outside its layers that every iteration multiplies by."""
        once = ("core.input_matrix", "core.output_matrix")
        return [p for p in self._matrices(CORE) if not p.name.startswith(once)]

    @property
    def _iteration_bytes(self) -> float:
        """Bytes that injection, signals and norms of an iteration keep, and the state that they read and write."""
        return injection_kept_bytes(self.shape) + self.shape.state_bytes()

    @property
    def _iteration_traffic(self) -> Traffic:
        """Traffic of an iteration besides its layers: compiled with them where nothing hooks into the layers."""
        parallel = self.config.parallel
        hooked = self.layout.tensor > 1 or parallel.core_gather != "once" or self.policy.every_layer
        return UNCOMPILED if hooked or self.model.core_ffn == "moe" else self.traffic

    @property
    def _iteration_kernels(self) -> int:
        """Number of kernels of an iteration besides its layers and products, in each pass."""
        model = self.model
        halting = HALTING_KERNELS.get(model.halting, 0)  # never compiled
        if self._iteration_traffic is not UNCOMPILED:
            return FUSED_ITERATION_KERNELS + halting
        return (
            INJECTION_KERNELS.get(model.injection, OTHER_INJECTION_KERNELS)
            + SIGNAL_KERNELS * len(model.signals)
            + halting
        )

    def outside_layers(self, backward: bool) -> dict[str, Cost]:
        """Return the cost of a pass through each layer of prelude and coda by unit, with what is recomputed."""
        if backward in self._outside:
            return self._outside[backward]
        model, found = self.model, self._outside.setdefault(backward, {})
        after = model.prelude_layers + model.core_layers
        for prefix, count, first in (("prelude", model.prelude_layers, 0), ("coda", model.coda_layers, after)):
            for i in range(count):
                unit = f"{prefix}.{i}"
                cost = self.layer(unit, first + i, backward)
                if backward and self.policy.every_layer:
                    cost += self.layer(unit, first + i, False)
                found[unit] = cost
        return found

    @cached_property
    def before_loop(self) -> Cost:
        """Cost of what precedes the loop: rounding of the core, embedding, initial state, input matrix, both passes."""
        model, shape = self.model, self.shape
        cost = self._move(shape.state_bytes(3), PASS_KERNELS)
        if shape.element_bytes < FLOAT32:
            rounded = [p for p in list_parameters(model) if p.is_rounded_once]
            cost += self._move(ROUND * sum(map(self._held_size, rounded)), len(rounded))
        if model.state_init == "normal":
            cost += self._move(NOISE * shape.stream_tokens * model.dim)
        for parameter in self._matrices(CORE):
            if parameter.name.startswith(("core.input_matrix", "core.output_matrix")):
                cost += self._products(parameter, False) + self._products(parameter, True)
        return cost

    @cached_property
    def loss(self) -> Cost:
        """Cost of the loss, whose gradients are computed in its forward pass, and of the embedding's gradient."""
        model, shape = self.model, self.shape
        rows, tokens = model.vocab_size / self.layout.tensor, shape.tokens
        matrix, chunks = rows * model.dim, -(-tokens // count_chunk_tokens(rows, shape.gpu))
        flops, ends = 2.0 * tokens * matrix, shape.element_bytes * tokens * (rows + model.dim)
        rate = self.rates.products if shape.element_bytes < FLOAT32 else self.rates.tf32_products
        product = max(flops / rate, (ends + shape.element_bytes * matrix * chunks) / self.rates.memory)
        # The matrix's gradient is summed over chunks in place.
        gradient = max(flops / rate, (ends + UPDATE * matrix * chunks) / self.rates.memory)
        moved = self.traffic.logit * tokens * rows + (FLOAT32 + ROUND + 2 * UPDATE + ADD) * matrix
        return Cost(2 * product + gradient, 3 * chunks) + self._move(moved)

    @property
    def outside_loop(self) -> Cost:
        """Cost of a micro-batch outside the loop, both passes."""
        layers = (*self.outside_layers(False).values(), *self.outside_layers(True).values())
        return sum(layers, self.before_loop + self.loss)

    def micro_batch(self, loops: float, with_grad: float) -> Cost:
        """Return the cost of a micro-batch's passes at a (mean) T and min(k, T)."""
        return self.outside_loop + self.loop(loops, False) + self.loop(with_grad, True)

    def optimizer_step(self) -> Cost:
        """Return the cost of clipping and of the optimizer for the parameters whose state this process holds."""
        engine, options = self.config.parallel.engine_kind, self.config.optimizer
        ranks = self.layout.shard * self.layout.context if engine.shards_parameters and not engine.zero_stage else 1
        share = 1 / self.layout.world_size if engine.zero_stage else 1.0
        cost = Cost()
        for parameter in list_parameters(self.model):
            size = parameter.padded_shard_size(self.layout, ranks) * share
            moments = moments_per_weight(parameter, options)
            # The norm reads a gradient. Fused AdamW scales it in passing, and writes it then.
            is_fused = moments == 2 and options.state_dtype == "float32" and not engine.zero_stage
            clip = FLOAT32 + (FLOAT32 if is_fused else UPDATE) if options.grad_clip else 0
            cost += self._move(size * (clip + FLOAT32 + UPDATE * (1 + moments)), (1 if is_fused else 2) if clip else 0)
            if moments == 1:  # Muon: Newton-Schulz steps with two products by the smaller Gram matrix and its square
                *experts, a, b = parameter.local_shape(self.layout)
                small, large = min(a, b), max(a, b)
                flops = options.ns_steps * (4.0 * small**2 * large + 2.0 * small**3) * (experts[0] if experts else 1)
                cost += Cost(flops / self.rates.products / ranks, 3 * options.ns_steps / ranks)
        return cost + Cost(0.0, STEP_KERNELS)

    def accumulation(self) -> Cost:
        """Return the cost of adding the gradients of a micro-batch after the first to those before."""
        parameters = list_parameters(self.model)
        return self._move(ADD * sum(map(self._held_size, parameters)), len(parameters))

    def _held_size(self, parameter: Parameter) -> float:
        """Return the elements of a parameter that a process computes with; in a loop ring, the mean over its stages."""
        stages = self.layout.ring if parameter.name.startswith("core.layers.") else 1
        return parameter.local_size(self.layout) / stages
