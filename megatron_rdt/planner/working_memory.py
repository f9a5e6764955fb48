"""Working memory: estimates of the temporary tensors alive at once within a part of a layer, or in the loss."""

from megatron_rdt.model.cross_entropy import count_chunk_tokens
from megatron_rdt.planner.shape import FLOAT32, Shape


def attention_widths(shape: Shape) -> tuple[float, float]:
    """Return the channels per token of all queries, and of all keys and values, on this process."""
    model, split = shape.model, shape.layout.tensor
    if model.attention == "mla":
        keys = model.heads * (2 * model.nope_dim + model.rope_dim + model.value_dim)
        return model.heads * (model.nope_dim + model.rope_dim) / split, keys / split
    return model.heads * model.head_dim / split, 2 * model.kv_heads * model.head_dim / split


def feedforward_width(shape: Shape, core: bool) -> float:
    """Return the inner channels per token on this process; for a mixture, those of the experts a token is sent to."""
    model, split = shape.model, shape.layout.tensor
    if core and model.core_ffn == "moe":
        return (model.experts_per_token * model.expert_width + model.shared_width) / split
    return model.ffn_width / split


def forward_working_bytes(shape: Shape, core: bool) -> float:
    """Return the bytes that a layer's forward pass without gradient has alive in its largest part."""
    queries, keys = attention_widths(shape)
    attention = shape.activation_bytes(shape.model.dim + 2 * queries + keys)
    rows = 3 * shape.model.experts_per_token * shape.model.dim if core and shape.model.core_ffn == "moe" else 0
    feedforward = shape.activation_bytes(shape.model.dim + 3 * feedforward_width(shape, core) + rows)
    return shape.state_bytes(2) + max(attention, feedforward)


def attention_backward_bytes(shape: Shape) -> float:
    """Return the bytes of gradients alive in attention's backward pass: of queries, keys, values, output and stream."""
    queries, keys = attention_widths(shape)
    working = shape.state_bytes(3) + shape.activation_bytes(queries + keys)
    if shape.model.attention == "mla" and not shape.gpu:
        scored = shape.model.nope_dim + shape.model.rope_dim
        if scored != shape.model.value_dim:
            working += 2 * FLOAT32 * shape.tokens * shape.sequence * shape.model.heads / shape.layout.tensor
    return working


def feedforward_backward_bytes(shape: Shape, core: bool) -> float:
    """Return the bytes that a feed-forward part's backward pass has alive besides what the forward pass kept."""
    working = shape.state_bytes(2) + shape.activation_bytes(2 * feedforward_width(shape, core))
    if core and shape.model.core_ffn == "moe":
        working += shape.activation_bytes(2 * shape.model.experts_per_token * shape.model.dim)
    return working


def expert_row_bytes(shape: Shape) -> float:
    """Return the bytes that routed experts keep until the gradients of all their weights have been computed."""
    width = shape.model.expert_width / shape.layout.tensor
    return shape.activation_bytes(shape.model.experts_per_token * width, 4)


def loss_working_bytes(shape: Shape, tokens: float) -> float:
    """Return the bytes that the chunked cross entropy of `tokens` tokens has alive besides the gradients it keeps."""
    model = shape.model
    rows = model.vocab_size / shape.layout.tensor
    largest = count_chunk_tokens(rows, shape.gpu)
    chunk, several = min(tokens, largest) * rows, tokens > largest
    # Logits and their gradient; with several chunks, the gradient of the last chunk lives until the next one's replaces it.
    copies = 3.0 if several else 2.0
    working = FLOAT32 * chunk * (copies + (2 if model.logit_softcap else 0))
    if shape.element_bytes < FLOAT32:
        matrix, logits = rows * model.dim, FLOAT32 * chunk * (copies - 1)
        # The matrix rounded to the compute dtype, then one chunk's gradient of it, which the CPU converts to float32 to add.
        added = shape.element_bytes * (chunk + matrix) + (0 if shape.gpu else FLOAT32 * matrix)
        first = working + shape.element_bytes * chunk * (not several)
        working = shape.element_bytes * matrix + max(first, logits + added)
    return working + shape.element_bytes * tokens * model.dim  # the features
