"""Memory that comes and goes inside one part of a layer, and in the loss: estimates of what is alive at once."""

from megatron_rdt.model.cross_entropy import CHUNK_ELEMENTS
from megatron_rdt.planner.shape import FLOAT32, Shape


def attention_widths(shape: Shape) -> tuple[float, float]:
    """Channels of all queries and of all keys and values on this process."""
    model, split = shape.model, shape.layout.tensor
    if model.attention == "mla":
        keys = model.heads * (2 * model.nope_dim + model.rope_dim + model.value_dim)
        return model.heads * (model.nope_dim + model.rope_dim) / split, keys / split
    return model.heads * model.head_dim / split, 2 * model.kv_heads * model.head_dim / split


def feedforward_width(shape: Shape, core: bool) -> float:
    """Inner channels per token on this process; of a mixture, those of the experts that a token is sent to."""
    model, split = shape.model, shape.layout.tensor
    if core and model.core_ffn == "moe":
        return (model.experts_per_token * model.expert_width + model.shared_width) / split
    return model.ffn_width / split


def forward_working(shape: Shape, core: bool) -> float:
    """Of a layer without gradient: what its largest part has alive."""
    queries, keys = attention_widths(shape)
    attention = shape.rounded(shape.model.dim + 2 * queries + keys)
    rows = 3 * shape.model.experts_per_token * shape.model.dim if core and shape.model.core_ffn == "moe" else 0
    feedforward = shape.rounded(shape.model.dim + 3 * feedforward_width(shape, core) + rows)
    return shape.state(2) + max(attention, feedforward)


def attention_backward(shape: Shape) -> float:
    """Of the backward pass of attention: gradients of queries, keys, values and output, the stream's gradient."""
    queries, keys = attention_widths(shape)
    working = shape.state(3) + shape.rounded(queries + keys)
    if shape.model.attention == "mla" and not shape.gpu:
        scored = shape.model.nope_dim + shape.model.rope_dim
        if scored != shape.model.value_dim:
            working += 2 * FLOAT32 * shape.tokens * shape.sequence * shape.model.heads / shape.layout.tensor
    return working


def feedforward_backward(shape: Shape, core: bool) -> float:
    """Of the backward pass of a feed-forward part, beside what the forward pass kept."""
    working = shape.state(2) + shape.rounded(2 * feedforward_width(shape, core))
    if core and shape.model.core_ffn == "moe":
        working += shape.rounded(2 * shape.model.experts_per_token * shape.model.dim)
    return working


def expert_rows(shape: Shape) -> float:
    """Of what routed experts keep: freed when the gradients of all their weights are there."""
    width = shape.model.expert_width / shape.layout.tensor
    return shape.rounded(shape.model.experts_per_token * width, 4)


def loss_forward(shape: Shape, tokens: float) -> float:
    """Of the chunked cross entropy of `tokens` tokens, beside the gradients that it keeps."""
    model = shape.model
    rows = model.vocab_size / shape.layout.tensor
    chunk = min(tokens, max(CHUNK_ELEMENTS // rows, 1)) * rows
    several = tokens * rows > CHUNK_ELEMENTS
    copies = 3.0 if several else 2.0  # logits, their gradient; those of the chunk before while the next are made
    working = FLOAT32 * chunk * (copies + (2 if model.logit_softcap else 0))
    if shape.compute < FLOAT32:
        matrix, logits = rows * model.dim, FLOAT32 * chunk * (copies - 1)
        # The rounded matrix; then a chunk's gradient of it, which the CPU widens before it is added.
        added = shape.compute * (chunk + matrix) + (0 if shape.gpu else FLOAT32 * matrix)
        working = shape.compute * matrix + max(working + shape.compute * chunk * (not several), logits + added)
    return working + shape.compute * tokens * model.dim  # the features
