"""Activation checkpointing policies: bytes that each keeps of the loop, and the share that it recomputes."""

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.activations import injection_kept_bytes, layer_kept_bytes
from megatron_rdt.planner.shape import FLOAT32, Shape
from megatron_rdt.planner.working_memory import attention_widths


class CheckpointingPolicy:
    """One choice of `depth.checkpoint`, in bytes and recomputed work.

    Args:
        name: none, per_iteration, per_layer, selective, or a number of iterations.

    Attributes:
        every_layer: True if the layers of prelude and coda keep only their inputs, too.
        recomputed_share: share of an iteration's forward pass that the backward pass computes again.
    """

    def __init__(self, name: str | int) -> None:
        self.name = name
        self.every_layer = name == "per_layer"
        self.recomputed_share = {"none": 0.0, "selective": 0.1}.get(str(name), 1.0)

    def segments(self, iterations: int) -> list[int]:
        """Split iterations into segments checkpointed together; return the number in each, the rest last."""
        size = int(self.name) if str(self.name).isdigit() else 1
        whole, rest = divmod(iterations, size)
        return [size] * whole + [rest] * bool(rest)

    def count_spared_reductions(self, config: RunConfig, layout: Layout, iterations: int) -> tuple[float, int]:
        """Count the tensor-parallel reductions of a micro-batch that recomputation omits: nothing reads their results.

        Returns:
            Their number, in whole micro-batches, and the calls.
        """
        model = config.model
        if not self.recomputed_share or model.norm_placement != "pre":
            return 0, 0
        inside, outside = 0, 0
        reads = model.core_norm == "iteration" or "lora" in model.signals or model.injection == "hyper"
        if self.every_layer:
            inside, outside = iterations * model.core_layers, model.prelude_layers + model.coda_layers
        elif layout.ring > 1:  # what a visit computes is read by the next one
            inside = iterations * layout.ring
        elif not reads:
            inside = len(self.segments(iterations))
        return inside + outside, inside * (config.train.micro_batch if layout.ring > 1 else 1) + outside

    def kept_bytes(self, shape: Shape, iterations: int) -> float:
        """Return the bytes that a segment keeps between its forward and backward pass."""
        everything = iterations * iteration_kept_bytes(shape)
        if self.name == "none":
            return everything
        lanes = shape.model.lanes if shape.model.injection == "hyper" else 1
        state = shape.state_bytes(lanes)
        if self.name == "per_layer":
            return injection_kept_bytes(shape) + shape.state_bytes(shape.model.core_layers)
        if self.name == "selective":
            return state + product_bytes(shape)
        return state

    def backward_bytes(self, shape: Shape, iterations: int) -> float:
        """Return the bytes of a segment when its backward pass begins, including what was recomputed."""
        if self.name == "per_layer":
            return self.kept_bytes(shape, iterations)
        return iterations * iteration_kept_bytes(shape)

    def transient_bytes(self, kept: float) -> float:
        """Return `kept`, a part's bytes, if they exist only in its layer's backward pass (per_layer), or 0."""
        return kept if self.every_layer else 0.0


def iteration_kept_bytes(shape: Shape) -> float:
    """Return the bytes that one iteration of the core keeps without checkpointing."""
    model = shape.model
    layers = sum(sum(layer_kept_bytes(shape, model.prelude_layers + i, core=True)) for i in range(model.core_layers))
    return layers + injection_kept_bytes(shape)


def product_bytes(shape: Shape) -> float:
    """Return the bytes of the results of matrix products and attention in one iteration, which `selective` keeps."""
    model = shape.model
    queries, keys = attention_widths(shape)
    wide = model.dim
    attention = shape.activation_bytes(queries + keys + queries + wide) + FLOAT32 * shape.tokens * model.heads
    inner = model.ffn_width / shape.layout.tensor
    feedforward = shape.activation_bytes((2 if model.ffn == "swiglu" else 1) * inner + wide)
    if model.core_ffn == "moe":
        rows = model.experts_per_token
        feedforward = shape.activation_bytes(rows * (2 * model.expert_width / shape.layout.tensor + wide))
        feedforward += shape.activation_bytes(2 * model.shared_width / shape.layout.tensor + wide)
    return model.core_layers * (attention + feedforward)
