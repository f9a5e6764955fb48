"""Peak memory of one process over a training step, from a replay of its allocations with sizes instead of tensors.

The replay runs forward through the units (prelude layers, core, coda layers), through the loss, and backward, once per
micro-batch, then steps the optimizer. Two micro-batches are enough: all after the first are alike. Sharded weights are
gathered before a unit and freed after it, as the engine does it; gradients appear in the order of the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner import activations, working_memory
from megatron_rdt.planner.engine_weights import make_weights
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.parameters import ROOT
from megatron_rdt.planner.recomputation import CheckpointingPolicy
from megatron_rdt.planner.ring import prepared_copies
from megatron_rdt.planner.shape import FLOAT32, INT64, Shape

INSIDE, OUTSIDE, LOSS, WORKING = "activations of the loop", "other activations", "loss", "working memory"
ROUNDED = "rounded core"


@dataclass(frozen=True)
class StepDepth:
    """Loop counts of a planned step.

    Attributes:
        loops: T.
        with_grad: iterations with gradient, min(k, T).
    """

    loops: int
    with_grad: int


@dataclass
class PeakMemory:
    """Peak memory of one process.

    Attributes:
        peak: bytes.
        moment: words for the moment of the peak.
        parts: bytes by kind at that moment, largest first.
    """

    peak: float
    moment: str
    parts: dict[str, float] = field(default_factory=dict)


class StepReplay:
    """Replays one step of a run on one process: holds and frees bytes in a ledger as the step would.

    Args:
        config: the run's config.
        layout: layout of its processes.
        gpu: True for the kernels of a GPU.
        depth: loop counts of the step.
    """

    def __init__(self, config: RunConfig, layout: Layout, gpu: bool, depth: StepDepth) -> None:
        self.config, self.depth = config, depth
        self.shape = Shape.of(config, layout, gpu)
        self.policy = CheckpointingPolicy(config.depth.checkpoint)
        self.ledger = Ledger()
        self._segments: dict[int, tuple[float, float]] = {}
        self.weights = make_weights(config, layout, self.ledger, gpu)
        self.micro_batches = config.train.global_batch // (layout.data * config.train.micro_batch)

    def run(self) -> PeakMemory:
        """Replay the step and return its peak."""
        ledger, config = self.ledger, self.config
        self.weights.hold_state()
        for number in range(min(self.micro_batches, 2)):  # the second stands for all later ones
            last = number == self.micro_batches - 1 or number == 1
            self.weights.begin_micro_batch(first=number == 0, last=last, summed=self.depth.with_grad > 1)
            ledger.hold("batch", 3 * INT64 * config.train.micro_batch * config.train.sequence_length)
            self._forward()
            self._backward()
            ledger.free("batch")
        self.weights.step_optimizer()
        parts = {kind: size for kind, size in sorted(ledger.at_peak.items(), key=lambda part: -part[1]) if size >= 1}
        return PeakMemory(ledger.peak, ledger.moment, parts)

    def _iterate_layers(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield (unit, index among all layers) of each layer of "prelude" or "coda", whichever `prefix` is."""
        model = self.config.model
        first = 0 if prefix == "prelude" else model.prelude_layers + model.core_layers
        for i in range(getattr(model, f"{prefix}_layers")):
            yield f"{prefix}.{i}", first + i

    def _forward(self) -> None:
        """Replay a micro-batch's forward pass, with its loss."""
        shape, ledger, weights = self.shape, self.ledger, self.weights
        weights.begin_unit(ROOT)
        if self.config.model.state_init == "normal":
            ledger.note_peak("the initial state", working_memory=4 * INT64 * shape.stream_tokens * shape.model.dim)
        for unit, index in self._iterate_layers("prelude"):
            self._layer_forward(unit, index)
        weights.begin_unit("core")
        ledger.hold(ROUNDED, self._rounded_bytes)
        if (
            self._rounded_bytes
        ):  # their sums of gradients are there before the loop; experts' begin in the backward pass
            rounded = (p.name for p in weights.parameters if p.is_rounded_once and not p.is_routed)
            weights.add_gradients(*rounded, summed=True)
        ledger.hold(OUTSIDE, activations.before_loop_kept_bytes(shape))
        self._loop_forward()
        weights.end_forward("core")
        ledger.hold(OUTSIDE, activations.after_loop_kept_bytes(shape))
        for unit, index in self._iterate_layers("coda"):
            self._layer_forward(unit, index)
        self._loss_forward()

    def _loop_forward(self) -> None:
        """Replay the loop's forward pass: iterations without gradient, then those that keep something."""
        shape, ledger = self.shape, self.ledger
        ledger.hold(INSIDE, shape.state_bytes())  # the prepared encoded input, held while the loop runs
        working = working_memory.forward_working_bytes(shape, core=True)
        if self.depth.loops > self.depth.with_grad:
            states = shape.state_bytes(1 + (self.config.model.lanes if self.config.model.injection == "hyper" else 1))
            ledger.note_peak("iterations without gradient", working_memory=states + working)
        for segment in self.policy.segments(self.depth.with_grad):
            ledger.hold(INSIDE, self._segment_bytes(segment)[0])
            ledger.note_peak("forward, in the loop", working_memory=working)
        ledger.free(INSIDE, shape.state_bytes())

    @property
    def _coda_runs(self) -> int:
        """Return the number of states the coda runs on: with an exit gate, that of each iteration with gradient."""
        return self.depth.with_grad if self.config.model.halting == "gate" else 1

    def _layer_kept_bytes(self, unit: str, index: int) -> tuple[float, float]:
        """Return bytes kept by a prelude or coda layer, (attention, feed-forward); recomputed, (its input, 0)."""
        times = self._coda_runs if unit.startswith("coda") else 1
        attention, feedforward = activations.layer_kept_bytes(self.shape, index)
        if self.policy.every_layer:
            return times * self.shape.state_bytes(), 0.0
        return times * attention, times * feedforward

    def _layer_forward(self, unit: str, index: int) -> None:
        """Replay the forward pass of a prelude or coda layer."""
        self.weights.begin_unit(unit)
        self.ledger.hold(OUTSIDE, sum(self._layer_kept_bytes(unit, index)))
        self.ledger.note_peak(f"forward, {unit}", working_memory=self.shape.state_bytes())
        self.weights.end_forward(unit)

    def _loss_forward(self) -> None:
        """Replay the loss, which computes the gradients of features and output matrix in its forward pass."""
        shape, ledger = self.shape, self.ledger
        tokens = self._coda_runs * shape.tokens
        ledger.hold(OUTSIDE, self._coda_runs * activations.loss_kept_bytes(shape))
        ledger.hold(LOSS, self._output_matrix_bytes)
        ledger.note_peak("the loss", loss=working_memory.loss_working_bytes(shape, tokens))

    @property
    def _rounded_bytes(self) -> float:
        """Bytes of the core's matrices in the compute dtype, made once per pass where the whole core is gathered."""
        config = self.config
        if config.train.precision == "float32" or config.parallel.core_gather != "once":
            return 0.0
        matrices = (p.local_size(self.shape.layout) for p in self.weights.parameters if p.is_rounded_once)
        return self.shape.element_bytes * sum(matrices)

    @property
    def _output_matrix_bytes(self) -> float:
        """Bytes of the gradient of the output matrix; the embedding's is as large."""
        model = self.config.model
        return FLOAT32 * model.dim * model.vocab_size / self.shape.layout.tensor

    def _backward(self) -> None:
        """Replay a micro-batch's backward pass."""
        shape, ledger, weights = self.shape, self.ledger, self.weights
        weights.begin_unit(ROOT, backward=True)
        features = self._coda_runs * shape.activation_bytes(shape.model.dim)
        ledger.note_peak("backward, the loss", loss=self._output_matrix_bytes + features)
        ledger.free(OUTSIDE, self._coda_runs * activations.loss_kept_bytes(shape))
        if not self.config.model.tie_embeddings:  # a tied matrix's gradient waits for the embedding's part of it
            ledger.free(LOSS)
            weights.add_gradients("head.")
        for unit, index in reversed(list(self._iterate_layers("coda"))):
            self._layer_backward(unit, index)
        weights.begin_unit("core", backward=True)
        ledger.free(OUTSIDE, activations.after_loop_kept_bytes(shape))
        self._loop_backward()
        ledger.free(OUTSIDE, activations.before_loop_kept_bytes(shape))
        weights.end_backward("core")
        for unit, index in reversed(list(self._iterate_layers("prelude"))):
            self._layer_backward(unit, index)
        ledger.note_peak("backward, the embedding", loss=self._output_matrix_bytes)
        ledger.free(LOSS)
        weights.add_gradients("embedding.", "final_norm.")
        weights.end_backward(ROOT)

    def _layer_backward(self, unit: str, index: int) -> None:
        """Replay the backward pass of a prelude or coda layer, feed-forward part first."""
        shape, ledger, weights = self.shape, self.ledger, self.weights
        times = self._coda_runs if unit.startswith("coda") else 1
        weights.begin_unit(unit, backward=True)
        kept = self._layer_kept_bytes(unit, index)
        if self.policy.every_layer:  # recomputed from the layer's input
            ledger.free(OUTSIDE, sum(kept))
            kept = activations.layer_kept_bytes(shape, index)
            ledger.hold(OUTSIDE, times * sum(kept))
        for part, held, working in self._list_parts(shape, kept, core=False):
            working = times * working + weights.temporary_gradient_bytes(unit, part)
            ledger.note_peak(f"backward, {unit}", working_memory=working)
            ledger.free(OUTSIDE, held)
            weights.add_gradients(f"{unit}.{part}")
        weights.end_backward(unit)

    @staticmethod
    def _list_parts(shape: Shape, kept: tuple[float, float], core: bool) -> list[tuple[str, float, float]]:
        """List a layer's parts in the order of the backward pass: name, kept bytes, bytes that computing it takes."""
        return [
            ("feedforward", kept[1], working_memory.feedforward_backward_bytes(shape, core)),
            ("attention", kept[0], working_memory.attention_backward_bytes(shape)),
        ]

    def _segment_bytes(self, iterations: int) -> tuple[float, float]:
        """Return the bytes of a segment between its passes, and when its backward pass begins."""
        if iterations not in self._segments:
            policy, shape = self.policy, self.shape
            self._segments[iterations] = policy.kept_bytes(shape, iterations), policy.backward_bytes(shape, iterations)
        return self._segments[iterations]

    def _list_core_layers(self, shape: Shape) -> list[tuple[str, list[tuple[str, float, float]]]]:
        """List the core's layers in the order of the backward pass, each with its parts as in `_list_parts`."""
        model, layers = shape.model, []
        for i in reversed(range(model.core_layers)):
            kept = activations.layer_kept_bytes(shape, model.prelude_layers + i, core=True)
            layers.append((f"core.layers.{i}", self._list_parts(shape, kept, core=True)))
        return layers

    def _loop_backward(self) -> None:
        """Replay the loop's backward pass, the last segment first; gradients of the core are summed over iterations."""
        ledger, layers = self.ledger, self._list_core_layers(self.shape)
        last = True  # the last iteration goes backward first: it creates the gradients that the others add to
        for segment in reversed(list(self.policy.segments(self.depth.with_grad))):
            kept, computed = self._segment_bytes(segment)
            ledger.free(INSIDE, kept)
            ledger.hold(INSIDE, computed)
            again = [sum(held for _, held, _ in parts) if computed > kept else 0.0 for _, parts in reversed(layers)]
            ledger.free(INSIDE, sum(again))
            for number, size in enumerate(again):
                self.weights.gather_again(number)
                ledger.hold(INSIDE, size)
            for _ in range(segment):
                self._iteration_backward(self.shape, layers, last)
                last = False
        ledger.free(ROUNDED)
        self.weights.add_gradients("core.")

    def _iteration_backward(
        self, shape: Shape, layers: list[tuple[str, list[tuple[str, float, float]]]], last: bool
    ) -> None:
        """Replay the backward pass through the core's `layers` once; the `last` iteration's is the first."""
        ledger, weights = self.ledger, self.weights
        for number, (unit, parts) in zip(reversed(range(len(layers))), layers):
            for part, held, working in parts:
                extra = self.policy.transient_bytes(held)
                mixture = part == "feedforward" and shape.model.core_ffn == "moe"
                freed = working_memory.expert_row_bytes(shape) if mixture else 0.0
                temporary = weights.temporary_gradient_bytes(unit, part, again=not last, freed=freed)
                working = shape.state_bytes(2) + working + temporary + extra
                ledger.note_peak("backward, in the loop", working_memory=working)
                ledger.free(INSIDE, held - extra)
                if last:
                    weights.add_gradients(f"{unit}.{part}")
            weights.free_layer(number)
        ledger.free(INSIDE, activations.injection_kept_bytes(shape))


class RingReplay(StepReplay):
    """Replays a step of a loop ring on a process of stage 0, which holds the most.

    The loop is that of one stage: every lap with gradient of each of the ring's sequences is a visit of its own, which
    keeps what one iteration of this stage's layers keeps. All visits are kept until the backward pass begins.
    """

    def __init__(self, config: RunConfig, layout: Layout, gpu: bool, depth: StepDepth) -> None:
        super().__init__(config, layout, gpu, depth)
        model = replace(config.model, core_layers=config.model.core_layers // layout.ring)
        self.visit = replace(self.shape, model=model, batch=1)
        self.sequences = layout.ring * config.train.micro_batch

    def _loop_forward(self) -> None:
        """Replay the forward pass of stage 0: what is sent to it, and the visits that keep something."""
        ledger, visit = self.ledger, self.visit
        lanes, prepared = visit.model.lanes if visit.model.injection == "hyper" else 1, prepared_copies(visit.model)
        kept = self.policy.kept_bytes(visit, 1)
        if visit.model.injection in ("residual", "hyper") and self.policy.recomputed_share:  # the carry arrives too
            kept += visit.state_bytes(lanes)
        # Of each sequence the prepared input, and after its laps what the last stage sent.
        ledger.hold(INSIDE, self.sequences * (visit.state_bytes(prepared + 1) + self.depth.with_grad * kept))
        working = working_memory.forward_working_bytes(visit, core=True)
        # What the next sequence enters with arrives a tick early.
        early = visit.state_bytes(lanes + prepared) if self.sequences > 1 else 0.0
        ledger.note_peak("forward, in the loop", working_memory=visit.state_bytes(2 + lanes) + working + early)

    def _loop_backward(self) -> None:
        """Replay the backward pass of stage 0 through two visits; those after them find less memory held."""
        ledger, visit, layers = self.ledger, self.visit, self._list_core_layers(self.visit)
        for number in range(min(self.sequences * self.depth.with_grad, 2)):
            ledger.free(INSIDE, self.policy.kept_bytes(visit, 1))
            ledger.hold(INSIDE, self.policy.backward_bytes(visit, 1))
            self._iteration_backward(visit, layers, last=number == 0)
        ledger.free(INSIDE)
        ledger.free(ROUNDED)
        self.weights.add_gradients("core.")


def step_memory(config: RunConfig, layout: Layout, gpu: bool, depth: StepDepth) -> PeakMemory:
    """Return the peak memory of one process over a step, and its parts."""
    replay = RingReplay if layout.ring > 1 else StepReplay
    return replay(config, layout, gpu, depth).run()
