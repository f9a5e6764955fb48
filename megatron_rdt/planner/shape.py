"""The sizes that one process computes on, from a config and a number of processes."""

from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout

FLOAT32, BFLOAT16 = 4, 2
COMPUTE_BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Shape:
    """One micro-batch on one process.

    Attributes:
        model: the config of the model.
        layout: how the processes are arranged.
        batch: sequences.
        sequence: tokens of a whole sequence.
        compute: bytes of a number in matrix products.
        gpu: whether the kernels are those of a GPU, which keep less.
        masked: whether attention has a mask other than the causal one.
    """

    model: ModelConfig
    layout: Layout
    batch: int
    sequence: int
    compute: int = FLOAT32
    gpu: bool = True
    masked: bool = False

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, gpu: bool) -> "Shape":
        """The shape of a run's micro-batches."""
        train = config.train
        return cls(
            config.model,
            layout,
            train.micro_batch,
            train.sequence_length,
            COMPUTE_BYTES[train.precision],
            gpu,
            bool(config.model.window or config.data.document_mask or layout.context > 1),
        )

    @property
    def tokens(self) -> int:
        """Tokens that attention and feed-forward parts of this process see."""
        return self.batch * self.sequence // self.layout.context

    @property
    def stream(self) -> float:
        """Tokens of which this process holds residual stream, state and norms."""
        return self.tokens / self.layout.tensor

    def state(self, copies: float = 1.0) -> float:
        """Bytes of the residual stream or recurrent state, float32; `copies` of it."""
        return copies * FLOAT32 * self.stream * self.model.dim

    def rounded(self, width: float, copies: float = 1.0) -> float:
        """Bytes of activations of all tokens in the compute dtype, `width` channels per token."""
        return copies * self.compute * self.tokens * width

    def norm(self, width: float, tokens: float | None = None, fused: bool = True) -> float:
        """Bytes that an RMSNorm keeps beside its input: the root, and where it is not one kernel the quotient."""
        tokens = self.stream if tokens is None else tokens
        return FLOAT32 * tokens * (1 if self.gpu and fused else 1 + width)
