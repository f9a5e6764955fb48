"""Bytes of activations that the parts of the model keep for the backward pass.

The formulas follow the model's code. A part keeps what its operators need for their gradients: a matrix product its
input, a product of two activations both, a norm or silu its input; sums keep nothing. The residual stream is float32,
the rest mostly in the compute dtype. Tests compare every function with the tensors that autograd saves.
"""

from megatron_rdt.model.attention.gqa import has_value_embedding
from megatron_rdt.planner.shape import FLOAT32, INT64, Shape


def attention_kept_bytes(shape: Shape, index: int) -> float:
    """Return the bytes that attention in layer `index` keeps, with its norm and input, without the residual stream."""
    part = _mla_kept_bytes if shape.model.attention == "mla" else _gqa_kept_bytes
    kept = _inner_norm_bytes(shape) + shape.activation_bytes(shape.model.dim) + part(shape, index)
    if shape.masked and not shape.gpu:  # on the CPU each call converts the boolean mask to numbers and keeps it
        rows = shape.batch if shape.model.window == 0 and shape.layout.context == 1 else 1
        kept += shape.element_bytes * rows * (shape.tokens / shape.batch) * shape.sequence
    return kept


def _inner_norm_bytes(shape: Shape) -> float:
    """Return the bytes that the norm before a layer's part keeps besides its input, where there is one."""
    return 0.0 if shape.model.norm_placement == "post" else shape.norm_bytes(shape.model.dim)


def _gqa_kept_bytes(shape: Shape, index: int) -> float:
    """Return the bytes that grouped-query attention keeps between its input and its output projection."""
    model, split = shape.model, shape.layout.tensor
    queries, keys = model.heads * model.head_dim / split, model.kv_heads * model.head_dim / split
    heads = (model.heads + model.kv_heads) / split
    # Context parallelism keeps the keys and values of the whole sequence.
    kept = shape.activation_bytes(queries + 2 * keys * shape.layout.context)
    kept += _attention_output_bytes(shape, queries, model.heads / split)
    if model.qk_norm != "none":
        wide = FLOAT32 * shape.tokens * (queries + keys)
        roots = 2 if model.qk_norm == "joint" else heads
        kept += wide + FLOAT32 * shape.tokens * roots  # the norm's input in float32, and a root per norm
        kept += wide if model.qk_norm != "plain" else 0.0
    if has_value_embedding(model, index):
        kept += shape.activation_bytes(2 * model.kv_heads / split)
        kept += shape.activation_bytes(keys) if shape.element_bytes < FLOAT32 else 0.0
    return kept


def _mla_kept_bytes(shape: Shape, index: int) -> float:
    """Return the bytes that multi-head latent attention keeps between its input and its output projection."""
    model, split, tokens = shape.model, shape.layout.tensor, shape.tokens
    heads, scored = model.heads / split, model.nope_dim + model.rope_dim
    kept = 0.0
    if model.query_rank:
        kept += FLOAT32 * tokens * model.query_rank + shape.norm_bytes(model.query_rank, tokens, fused=False)
        kept += shape.activation_bytes(model.query_rank)
    # The latent in float32; in float32 runs it is a view of the product that also holds the shared rotary key.
    kept += FLOAT32 * tokens * (model.kv_rank + (model.rope_dim if shape.element_bytes == FLOAT32 else 0))
    kept += shape.norm_bytes(model.kv_rank, tokens, fused=False)
    kept += shape.activation_bytes(model.kv_rank + model.rope_dim, shape.layout.context)
    every = tokens * shape.layout.context  # context parallelism gathers the keys and values of the whole sequence
    if shape.gpu or scored == model.value_dim:
        expanded = scored + model.nope_dim + model.value_dim  # the values are a view of the expanded latent
        kept += shape.activation_bytes(heads * scored) + shape.element_bytes * every * heads * expanded
        return kept + _attention_output_bytes(shape, heads * model.value_dim, heads)
    # Where keys and values differ in width, the CPU has no fused kernel and all scores exist, in float32.
    kept += FLOAT32 * heads * (tokens * scored + every * (scored + model.value_dim) + tokens * shape.sequence)
    return kept + shape.activation_bytes(heads * model.value_dim)


def _attention_output_bytes(shape: Shape, width: float, heads: float) -> float:
    """Return the bytes of attention's output and log-denominators."""
    return shape.activation_bytes(width) + FLOAT32 * shape.tokens * heads


def feedforward_kept_bytes(shape: Shape, core: bool) -> float:
    """Return the bytes that a feed-forward part keeps, with its norm and input, without the residual stream."""
    model = shape.model
    kept = _inner_norm_bytes(shape)
    if core and model.core_ffn == "moe":
        return kept + _moe_kept_bytes(shape)
    kept += shape.activation_bytes(model.dim)
    inner = model.ffn_width / shape.layout.tensor
    return kept + shape.activation_bytes(inner, 4 if model.ffn == "swiglu" else 2)


def _moe_kept_bytes(shape: Shape) -> float:
    """Return the bytes that a mixture of experts keeps: routing, rows sorted by expert, inner activations."""
    model, split, expert_parallel = shape.model, shape.layout.tensor, shape.layout.expert > 1
    # With expert parallelism each process routes its own tokens; with tensor parallelism all of them route all tokens.
    tokens, rows = shape.stream_tokens if expert_parallel else shape.tokens, model.experts_per_token
    kept: float = FLOAT32 * tokens * model.dim  # the router reads float32
    if model.shared_width and (shape.element_bytes < FLOAT32 or (expert_parallel and split > 1)):
        kept += shape.activation_bytes(model.dim)
    kept += tokens * (FLOAT32 * (model.experts + 3 * rows) + (shape.element_bytes + 3 * INT64) * rows)
    kept += shape.element_bytes * tokens * rows * model.dim * 2  # rows sorted by expert, and the experts' outputs
    kept += shape.activation_bytes(rows * model.expert_width / split, 4)
    return kept + shape.activation_bytes(model.shared_width / split, 4)


def layer_kept_bytes(shape: Shape, index: int, core: bool = False) -> tuple[float, float]:
    """Return the bytes that a layer keeps, (attention, feed-forward part), with the residual streams they read."""
    stream = shape.state_bytes()
    attention, feedforward = attention_kept_bytes(shape, index), feedforward_kept_bytes(shape, core)
    if shape.model.norm_placement != "pre":  # the outer norms and what they read
        outer = stream + shape.norm_bytes(shape.model.dim)
        attention, feedforward = attention + outer, feedforward + outer
    if core and "adaln" in shape.model.signals:
        attention, feedforward = attention + stream, feedforward + stream
    if shape.model.norm_placement == "post":  # the part reads the stream itself, counted as its input
        return attention, feedforward
    return attention + stream, feedforward + stream


# Copies of the state that each injection keeps in every iteration besides the input of the layers (INJECTION_COPIES; a
# lane of hyper has LANE_COPIES more), and copies of the encoded input that it prepares once (PREPARED_COPIES).
INJECTION_COPIES = {"diagonal": 1, "residual": 2, "linear": 1, "add": 0, "gate": 1, "hyper": 1, "none": 0}
LANE_COPIES = 3
PREPARED_COPIES = {"diagonal": 1, "residual": 1, "linear": 1, "add": 0, "gate": 5, "hyper": 1, "none": 0}


def injection_kept_bytes(shape: Shape) -> float:
    """Return the bytes that an iteration keeps besides those of its layers: injection, signals, norm, halting."""
    model = shape.model
    kept = shape.state_bytes(INJECTION_COPIES[model.injection])
    if model.injection == "residual":
        kept += shape.norm_bytes(model.dim)
    if model.injection == "hyper":
        kept += shape.state_bytes(LANE_COPIES * model.lanes)
    if "lora" in model.signals:
        kept += shape.element_bytes * shape.stream_tokens * (model.dim + 3 * model.signal_rank)
    if model.core_norm == "iteration":
        kept += shape.state_bytes() + shape.norm_bytes(model.dim)
    if model.halting == "act":
        kept += FLOAT32 * shape.stream_tokens * 6 + (shape.state_bytes() if model.injection in ("add", "none") else 0.0)
    if model.halting == "gate":
        kept += FLOAT32 * shape.stream_tokens * 10
    return kept


def before_loop_kept_bytes(shape: Shape) -> float:
    """Return the bytes kept between prelude and loop: tokens, encoded input, its norm and preparation, initial state."""
    model = shape.model
    kept = shape.state_bytes(PREPARED_COPIES[model.injection]) + INT64 * shape.tokens * 2  # and the tokens
    if model.encoded_norm:
        kept += shape.state_bytes() + shape.norm_bytes(model.dim)
    if model.input_matrix:
        kept += shape.state_bytes()
    if model.injection == "hyper":
        kept += shape.state_bytes(model.lanes)
    tables = sum(has_value_embedding(model, model.prelude_layers + i) for i in range(model.core_layers))
    return kept + FLOAT32 * shape.tokens * tables * model.kv_heads * model.head_dim / shape.layout.tensor


def after_loop_kept_bytes(shape: Shape) -> float:
    """Return the bytes kept between loop and coda: norm, output matrix, halting."""
    model, kept = shape.model, 0.0
    if model.core_norm in ("last", "last_shared"):
        kept += shape.state_bytes() + shape.norm_bytes(model.dim)
    if model.output_matrix:
        kept += shape.state_bytes()
    if model.halting == "act":
        kept += shape.state_bytes()
    return kept


def loss_kept_bytes(shape: Shape) -> float:
    """Return the bytes of the final norm and of the features' gradient, which the loss computes in its forward pass."""
    norm = shape.state_bytes() + shape.norm_bytes(shape.model.dim) if shape.model.final_norm else 0.0
    return norm + shape.activation_bytes(shape.model.dim)
