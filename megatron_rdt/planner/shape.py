"""Sizes of the tensors that one process computes on, from a config and a layout of processes."""

from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout

FLOAT32, BFLOAT16, INT64 = 4, 2, 8
COMPUTE_BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Shape:
    """Size of one micro-batch on one process, and the bytes of the tensors in it.

    Attributes:
        model: config of the model.
        layout: layout of the processes.
        batch: sequences of the micro-batch.
        sequence: tokens of a whole sequence.
        element_bytes: bytes of a number in the compute dtype.
        gpu: True for the kernels of a GPU, which keep less.
        masked: True if attention has a mask other than the causal one.
    """

    model: ModelConfig
    layout: Layout
    batch: int
    sequence: int
    element_bytes: int = FLOAT32
    gpu: bool = True
    masked: bool = False

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, gpu: bool) -> "Shape":
        """Return the shape of the micro-batches of a run."""
        train = config.train
        element_bytes = COMPUTE_BYTES[train.precision]
        masked = bool(config.model.window or config.data.document_mask or layout.context > 1)
        return cls(config.model, layout, train.micro_batch, train.sequence_length, element_bytes, gpu, masked)

    @property
    def tokens(self) -> int:
        """Tokens that the attention and feed-forward parts of this process compute on."""
        return self.batch * self.sequence // self.layout.context

    @property
    def stream_tokens(self) -> float:
        """Tokens whose residual stream, state and norms this process holds: with tensor parallelism, part of `tokens`."""
        return self.tokens / self.layout.tensor

    def state_bytes(self, copies: float = 1.0) -> float:
        """Return the bytes of `copies` of the residual stream, or of the recurrent state, in float32."""
        return copies * FLOAT32 * self.stream_tokens * self.model.dim

    def activation_bytes(self, width: float, copies: float = 1.0) -> float:
        """Return the bytes of activations in the compute dtype: `width` channels for each of `tokens`."""
        return copies * self.element_bytes * self.tokens * width

    def norm_bytes(self, width: float, tokens: float | None = None, fused: bool = True) -> float:
        """Return the bytes that an RMSNorm keeps besides its input: the root, and the quotient unless it is one kernel."""
        tokens = self.stream_tokens if tokens is None else tokens
        return FLOAT32 * tokens * (1 if self.gpu and fused else 1 + width)
