"""What each policy of `depth.checkpoint` keeps of the loop, and how much of it is computed again."""

from megatron_rdt.config import ModelConfig
from megatron_rdt.planner.activations import injection_kept, layer_kept
from megatron_rdt.planner.shape import FLOAT32, Shape
from megatron_rdt.planner.working import attention_widths


class Policy:
    """One policy.

    Args:
        name: none, per_iteration, per_layer, selective, or a number of iterations.

    Attributes:
        every_layer: whether the layers of prelude and coda keep their inputs only, too.
        recompute: forward passes of an iteration that are run again in the backward pass, as a share of one.
    """

    def __init__(self, name: str | int) -> None:
        self.name = name
        self.every_layer = name == "per_layer"
        self.recompute = {"none": 0.0, "selective": 0.1}.get(str(name), 1.0)

    def segments(self, iterations: int) -> list[int]:
        """Iterations that are kept, and computed again, together."""
        size = int(self.name) if str(self.name).isdigit() else 1
        whole, rest = divmod(iterations, size)
        return [size] * whole + [rest] * bool(rest)

    def spared_sums(self, model: ModelConfig, iterations: int) -> int:
        """Sums over tensor-parallel processes that are not made again: the last of a segment, if nothing keeps it."""
        if not self.recompute or model.norm_placement != "pre":
            return 0
        if self.every_layer:
            return iterations * model.core_layers + model.prelude_layers + model.coda_layers
        keeps = model.core_norm == "iteration" or "lora" in model.signals or model.injection == "hyper"
        return 0 if keeps else len(self.segments(iterations))

    def kept(self, shape: Shape, iterations: int) -> float:
        """Bytes that a segment keeps between forward and backward."""
        everything = iterations * iteration_kept(shape)
        if self.name == "none":
            return everything
        lanes = shape.model.lanes if shape.model.injection == "hyper" else 1
        state = shape.state(lanes)
        if self.name == "per_layer":
            return injection_kept(shape) + shape.state(shape.model.core_layers)
        if self.name == "selective":
            return state + products_kept(shape)
        return state

    def held_in_backward(self, shape: Shape, iterations: int) -> float:
        """Bytes of a segment when its backward pass begins, what was computed again included."""
        if self.name == "per_layer":
            return self.kept(shape, iterations)
        return iterations * iteration_kept(shape)

    def recomputed(self, kept: float) -> float:
        """Of the `kept` bytes of a layer's part, those that exist in the backward pass of their layer only."""
        return kept if self.every_layer else 0.0


def iteration_kept(shape: Shape) -> float:
    """Bytes that one iteration of the core keeps without checkpointing."""
    model = shape.model
    layers = sum(sum(layer_kept(shape, model.prelude_layers + i, core=True)) for i in range(model.core_layers))
    return layers + injection_kept(shape)


def products_kept(shape: Shape) -> float:
    """Bytes of what matrix products and attention give in one iteration."""
    model = shape.model
    queries, keys = attention_widths(shape)
    wide = model.dim
    attention = shape.rounded(queries + keys + queries + wide) + FLOAT32 * shape.tokens * model.heads
    inner = model.ffn_width / shape.layout.tensor
    feedforward = shape.rounded((2 if model.ffn == "swiglu" else 1) * inner + wide)
    if model.core_ffn == "moe":
        rows = model.experts_per_token
        feedforward = shape.rounded(rows * (2 * model.expert_width / shape.layout.tensor + wide))
        feedforward += shape.rounded(2 * model.shared_width / shape.layout.tensor + wide)
    return model.core_layers * (attention + feedforward)
