"""What a forward pass keeps for the backward pass, in bytes, read off the model's code part by part.

d is the width of the model, c the compute dtype (4 or 2 bytes), everything of the residual stream is float32. A part keeps
what its operators need for their gradients: a matrix product its input, a product of two activations both, a norm its
input, silu its input. Sums keep nothing. Tests compare every function with what autograd really saves.
"""

from megatron_rdt.model.attention.gqa import has_value_embedding
from megatron_rdt.planner.shape import FLOAT32, Shape

INT64 = 8


def attention_kept(shape: Shape, index: int) -> float:
    """Of the attention of layer `index`, its norm and input included, without the residual stream."""
    part = _latent if shape.model.attention == "mla" else _grouped
    kept = shape.norm(shape.model.dim) + shape.rounded(shape.model.dim) + part(shape, index)
    if shape.masked and not shape.gpu:  # the boolean mask becomes one of numbers in every call
        rows = shape.batch if shape.model.window == 0 and shape.layout.context == 1 else 1
        kept += shape.compute * rows * (shape.tokens / shape.batch) * shape.sequence
    return kept


def _grouped(shape: Shape, index: int) -> float:
    model, split = shape.model, shape.layout.tensor
    queries, keys = model.heads * model.head_dim / split, model.kv_heads * model.head_dim / split
    heads = (model.heads + model.kv_heads) / split
    # Context parallelism keeps the keys and values of the whole sequence.
    kept = shape.rounded(queries + 2 * keys * shape.layout.context) + _attended(shape, queries, model.heads / split)
    if model.qk_norm != "none":
        wide = FLOAT32 * shape.tokens * (queries + keys)
        kept += wide + FLOAT32 * shape.tokens * heads  # the norm's input in float32, and a root per head
        kept += wide if model.qk_norm == "learned" else 0.0
    if has_value_embedding(model, index):
        kept += shape.rounded(2 * model.kv_heads / split)
        kept += shape.rounded(keys) if shape.compute < FLOAT32 else 0.0
    return kept


def _latent(shape: Shape, index: int) -> float:
    model, split, tokens = shape.model, shape.layout.tensor, shape.tokens
    heads, scored = model.heads / split, model.nope_dim + model.rope_dim
    kept = 0.0
    if model.query_rank:
        kept += FLOAT32 * tokens * model.query_rank + shape.norm(model.query_rank, tokens, fused=False)
        kept += shape.rounded(model.query_rank)
    # The latent in float32 is the storage of its product with the weights where nothing is rounded, with the key behind it.
    kept += FLOAT32 * tokens * (model.kv_rank + (model.rope_dim if shape.compute == FLOAT32 else 0))
    kept += shape.norm(model.kv_rank, tokens, fused=False)
    kept += shape.rounded(model.kv_rank + model.rope_dim, shape.layout.context)
    every = tokens * shape.layout.context  # keys and values are those of the whole sequence
    if shape.gpu or scored == model.value_dim:
        expanded = scored + model.nope_dim + model.value_dim  # the values are a view of what was expanded
        kept += shape.rounded(heads * scored) + shape.compute * every * heads * expanded
        return kept + _attended(shape, heads * model.value_dim, heads)
    # Heads of different widths: on the CPU all scores exist, in float32.
    kept += FLOAT32 * heads * (tokens * scored + every * (scored + model.value_dim) + tokens * shape.sequence)
    return kept + shape.rounded(heads * model.value_dim)


def _attended(shape: Shape, width: float, heads: float) -> float:
    """What attention gave, the logarithms of its denominators, and, on the CPU, a copy in the order of the tokens."""
    return shape.rounded(width, 1 if shape.gpu else 2) + FLOAT32 * shape.tokens * heads


def feedforward_kept(shape: Shape, core: bool) -> float:
    """Of a feed-forward part, its norm and input included, without the residual stream."""
    model = shape.model
    kept = shape.norm(model.dim)
    if core and model.core_ffn == "moe":
        return kept + _mixture(shape)
    kept += shape.rounded(model.dim)
    inner = model.ffn_width / shape.layout.tensor
    return kept + shape.rounded(inner, 4 if model.ffn == "swiglu" else 2)


def _mixture(shape: Shape) -> float:
    model, split, shared_out = shape.model, shape.layout.tensor, shape.layout.expert > 1
    # Experts that are shared out take the tokens of a process; experts that are split, all tokens.
    tokens, rows = shape.stream if shared_out else shape.tokens, model.experts_per_token
    kept: float = FLOAT32 * tokens * model.dim  # the router reads float32
    if model.shared_width and (shape.compute < FLOAT32 or (shared_out and split > 1)):
        kept += shape.rounded(model.dim)
    kept += FLOAT32 * tokens * (model.experts + 3 * rows) + shape.compute * tokens * rows + 3 * INT64 * tokens * rows
    # Rows before and after they are sorted and back, once more at each exchange.
    kept += shape.compute * tokens * rows * model.dim * (6 if shared_out else 4)
    kept += shape.rounded(rows * model.expert_width / split, 4)
    return kept + shape.rounded(model.shared_width / split, 4)


def layer_kept(shape: Shape, index: int, core: bool = False) -> tuple[float, float]:
    """Of the attention and of the feed-forward part of a layer, the residual streams that they read included."""
    stream, attention, feedforward = shape.state(), attention_kept(shape, index), feedforward_kept(shape, core)
    if shape.model.norm_placement != "pre":  # the outer norms and what they read
        outer = shape.state() + shape.norm(shape.model.dim)
        attention, feedforward = attention + outer, feedforward + outer
    if core and "adaln" in shape.model.signals:
        attention, feedforward = attention + shape.state(), feedforward + shape.state()
    return attention + stream, feedforward + stream


# Copies of the state that an injection keeps in every iteration, beside the layers' own input, and of its input, once.
INJECTION_COPIES = {"diagonal": 1, "residual": 2, "linear": 1, "add": 0, "gate": 1, "hyper": 1}
LANE_COPIES = 3
PREPARED_COPIES = {"diagonal": 1, "residual": 1, "linear": 1, "add": 0, "gate": 5, "hyper": 1}


def injection_kept(shape: Shape) -> float:
    """Of an iteration, beside its layers."""
    model = shape.model
    kept = shape.state(INJECTION_COPIES[model.injection])
    if model.injection == "residual":
        kept += shape.norm(model.dim)
    if model.injection == "hyper":
        kept += shape.state(LANE_COPIES * model.lanes)
    if "lora" in model.signals:
        kept += shape.compute * shape.stream * (model.dim + 3 * model.signal_rank)
    if model.core_norm == "iteration":
        kept += shape.state() + shape.norm(model.dim)
    if model.halting == "act":
        kept += FLOAT32 * shape.stream * 6 + (shape.state() if model.injection == "add" else 0.0)
    if model.halting == "gate":
        kept += FLOAT32 * shape.stream * 10
    return kept


def before_loop_kept(shape: Shape) -> float:
    """Between prelude and loop: norm of the encoded input, what is made of it, the initial state."""
    model = shape.model
    kept = shape.state(PREPARED_COPIES[model.injection]) + INT64 * shape.tokens * 2  # and the tokens
    if model.encoded_norm:
        kept += shape.state() + shape.norm(model.dim)
    if model.input_matrix:
        kept += shape.state()
    if model.injection == "hyper":
        kept += shape.state(model.lanes)
    tables = sum(has_value_embedding(model, model.prelude_layers + i) for i in range(model.core_layers))
    return kept + FLOAT32 * shape.tokens * tables * model.kv_heads * model.head_dim / shape.layout.tensor


def after_loop_kept(shape: Shape) -> float:
    """Between loop and coda."""
    model, kept = shape.model, 0.0
    if model.core_norm in ("last", "last_shared"):
        kept += shape.state() + shape.norm(model.dim)
    if model.output_matrix:
        kept += shape.state()
    if model.halting == "act":
        kept += shape.state()
    return kept


def loss_kept(shape: Shape) -> float:
    """Of the final norm and the features' gradient, which the loss makes in the forward pass."""
    return shape.state() + shape.norm(shape.model.dim) + shape.rounded(shape.model.dim)
