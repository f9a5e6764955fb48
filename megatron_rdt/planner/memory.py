"""Memory of one process over a training step: a replay of what is allocated and freed, in order, with sizes for tensors.

The replay goes forward through the units (prelude layers, core, coda layers), through the loss, and backward, once per
micro-batch (the second stands for all that follow it), then steps the optimizer. Sharded weights are gathered before a
unit and freed after it as the engine does; gradients appear in the backward pass as autograd makes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.activations import (
    after_loop_kept,
    before_loop_kept,
    injection_kept,
    layer_kept,
    loss_kept,
)
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.parameters import FLOAT32, ROOT, parameters_of
from megatron_rdt.planner.recomputation import Policy
from megatron_rdt.planner.shape import Shape
from megatron_rdt.planner.weights import Weights, make_weights
from megatron_rdt.planner.working import (
    attention_backward,
    expert_rows,
    feedforward_backward,
    forward_working,
    loss_forward,
)

INSIDE, OUTSIDE, LOSS, WORKING = "activations of the loop", "other activations", "loss", "working memory"
INT64 = 8


@dataclass(frozen=True)
class Depth:
    """How deep the replayed step is.

    Attributes:
        loops: T.
        with_grad: min(k, T).
    """

    loops: int
    with_grad: int


@dataclass
class Memory:
    """Of one process.

    Attributes:
        peak: bytes.
        moment: when it is reached.
        parts: what it consists of then, bytes by kind, largest first.
    """

    peak: float
    moment: str
    parts: dict[str, float] = field(default_factory=dict)


class Replay:
    """One step of a run on one process.

    Args:
        config: of the run.
        layout: of its processes.
        gpu: whether kernels are those of a GPU.
        depth: T and k of the step.
    """

    def __init__(self, config: RunConfig, layout: Layout, gpu: bool, depth: Depth) -> None:
        self.config, self.depth = config, depth
        self.shape = Shape.of(config, layout, gpu)
        self.policy = Policy(config.depth.checkpoint)
        self.ledger = Ledger()
        self.parameters = parameters_of(config.model)
        self.weights: Weights = make_weights(config, layout, self.parameters, self.ledger, gpu)
        self.micro_batches = config.train.global_batch // (layout.data * config.train.micro_batch)

    def run(self) -> Memory:
        """Replay the step."""
        ledger, config = self.ledger, self.config
        self.weights.start()
        for number in range(min(self.micro_batches, 2)):
            last = number == self.micro_batches - 1 or number == 1
            self.weights.begin(first=number == 0, last=last, summed=self.depth.with_grad > 1)
            ledger.hold("batch", 3 * INT64 * config.train.micro_batch * config.train.sequence_length)
            self._forward()
            self._backward()
            ledger.free("batch")
        self.weights.finish()
        parts = {kind: size for kind, size in sorted(ledger.at_peak.items(), key=lambda part: -part[1]) if size >= 1}
        return Memory(ledger.peak, ledger.moment, parts)

    def _layers(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Unit and index among all layers of the prelude's or coda's layers."""
        model = self.config.model
        first = 0 if prefix == "prelude" else model.prelude_layers + model.core_layers
        for i in range(getattr(model, f"{prefix}_layers")):
            yield f"{prefix}.{i}", first + i

    def _forward(self) -> None:
        shape, ledger, weights = self.shape, self.ledger, self.weights
        weights.before(ROOT)
        if self.config.model.state_init == "normal":
            ledger.look("the initial state", working_memory=4 * INT64 * shape.stream * shape.model.dim)
        for unit, index in self._layers("prelude"):
            self._layer_forward(unit, index)
        weights.before("core")
        ledger.hold(OUTSIDE, before_loop_kept(shape))
        ledger.hold(INSIDE, shape.state())  # the prepared input, held while the loop runs
        if self.depth.loops > self.depth.with_grad:
            states = shape.state(1 + (self.config.model.lanes if self.config.model.injection == "hyper" else 1))
            ledger.look("iterations without gradient", working_memory=states + forward_working(shape, core=True))
        for segment in self.policy.segments(self.depth.with_grad):
            ledger.hold(INSIDE, self.policy.kept(shape, segment))
            ledger.look("forward, in the loop", working_memory=forward_working(shape, core=True))
        ledger.free(INSIDE, shape.state())
        weights.after("core")
        ledger.hold(OUTSIDE, after_loop_kept(shape))
        for unit, index in self._layers("coda"):
            self._layer_forward(unit, index)
        self._loss_forward()

    @property
    def _codas(self) -> int:
        """How often the coda reads a state: the exit gate's objective reads every iteration's."""
        return self.depth.with_grad if self.config.model.halting == "gate" else 1

    def _layer_kept(self, unit: str, index: int) -> tuple[float, float]:
        """What attention and feed-forward of a prelude or coda layer keep."""
        times = self._codas if unit.startswith("coda") else 1
        attention, feedforward = layer_kept(self.shape, index)
        if self.policy.every_layer:
            return times * self.shape.state(), 0.0
        return times * attention, times * feedforward

    def _layer_forward(self, unit: str, index: int) -> None:
        self.weights.before(unit)
        self.ledger.hold(OUTSIDE, sum(self._layer_kept(unit, index)))
        self.ledger.look(f"forward, {unit}", working_memory=self.shape.state())
        self.weights.after(unit)

    def _loss_forward(self) -> None:
        shape, ledger = self.shape, self.ledger
        tokens = self._codas * shape.tokens
        ledger.hold(OUTSIDE, self._codas * loss_kept(shape))
        ledger.hold(LOSS, self._matrix)
        ledger.look("the loss", loss=loss_forward(shape, tokens))

    @property
    def _matrix(self) -> float:
        """Bytes of the output matrix's gradient."""
        model = self.config.model
        return FLOAT32 * model.dim * model.vocab_size / self.shape.layout.tensor

    def _backward(self) -> None:
        shape, ledger, weights = self.shape, self.ledger, self.weights
        weights.before(ROOT, backward=True)
        features = self._codas * shape.rounded(shape.model.dim)
        ledger.look("backward, the loss", loss=self._matrix + features)
        ledger.free(OUTSIDE, self._codas * loss_kept(shape))
        if not self.config.model.tie_embeddings:  # tied, it waits for the embedding's part
            ledger.free(LOSS)
            weights.gradient("head.")
        for unit, index in reversed(list(self._layers("coda"))):
            self._layer_backward(unit, index)
        weights.before("core", backward=True)
        ledger.free(OUTSIDE, after_loop_kept(shape))
        self._loop_backward()
        ledger.free(OUTSIDE, before_loop_kept(shape))
        weights.reduce("core")
        for unit, index in reversed(list(self._layers("prelude"))):
            self._layer_backward(unit, index)
        ledger.look("backward, the embedding", loss=self._embedding)
        ledger.free(LOSS)
        weights.gradient("embedding.", "final_norm.")
        weights.reduce(ROOT)

    @property
    def _embedding(self) -> float:
        model = self.config.model
        return FLOAT32 * model.dim * model.vocab_size / self.shape.layout.tensor

    def _layer_backward(self, unit: str, index: int) -> None:
        shape, ledger, weights = self.shape, self.ledger, self.weights
        times = self._codas if unit.startswith("coda") else 1
        weights.before(unit, backward=True)
        kept = self._layer_kept(unit, index)
        if self.policy.every_layer:  # all of the layer is there again
            ledger.free(OUTSIDE, sum(kept))
            kept = layer_kept(shape, index)
            ledger.hold(OUTSIDE, times * sum(kept))
        for part, held, working in (
            ("feedforward", kept[1], feedforward_backward(shape, core=False)),
            ("attention", kept[0], attention_backward(shape)),
        ):
            ledger.look(f"backward, {unit}", working_memory=times * working + weights.largest(unit, part))
            ledger.free(OUTSIDE, held)
            weights.gradient(f"{unit}.{part}")
        weights.reduce(unit)

    def _loop_backward(self) -> None:
        """The loop's segments, last first; gradients of the core are summed over them."""
        shape, ledger, weights, model = self.shape, self.ledger, self.weights, self.config.model
        first_layer = model.prelude_layers
        last = True
        for segment in reversed(list(self.policy.segments(self.depth.with_grad))):
            ledger.free(INSIDE, self.policy.kept(shape, segment))
            held = self.policy.held_in_backward(shape, segment)
            ledger.hold(INSIDE, held)
            for _ in range(segment):
                for i in reversed(range(model.core_layers)):
                    attention, feedforward = layer_kept(shape, first_layer + i, core=True)
                    for part, kept, working in (
                        ("feedforward", feedforward, feedforward_backward(shape, core=True)),
                        ("attention", attention, attention_backward(shape)),
                    ):
                        unit = f"core.layers.{i}"
                        extra = self.policy.recomputed(kept)
                        temporary = weights.largest(unit, part, again=not last)
                        if part == "feedforward" and model.core_ffn == "moe":  # its rows are gone by then
                            temporary = max(temporary - expert_rows(shape), 0.0)
                        ledger.look(
                            "backward, in the loop", working_memory=shape.state(2) + working + temporary + extra
                        )
                        ledger.free(INSIDE, kept - extra)
                        if last:
                            weights.gradient(f"{unit}.{part}")
                ledger.free(INSIDE, injection_kept(shape))
                last = False
        weights.gradient("core.")


def step_memory(config: RunConfig, layout: Layout, gpu: bool, depth: Depth) -> Memory:
    """The peak of one process over a step, and what it consists of."""
    return Replay(config, layout, gpu, depth).run()
