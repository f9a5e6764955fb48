"""A small engine of this project, random tokens, and one optimizer step, as the benchmarks take it."""

from typing import Any

import torch

from megatron_rdt.config import ModelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.parallel import Engine, MicroBatch, build_engine
from tools.timing import pick_device

LR, MAX_NORM = 1e-4, 1.0
VOCABULARY = 4096


def build_small_engine(precision: str | None = None, compiled: str = "none", **sizes: Any) -> Engine:
    """A single-process engine on the GPU if there is one, with a model of these sizes.

    Args:
        precision: by default bfloat16 on a GPU, float32 on the CPU.
        compiled: value of `train.compile`.
        sizes: fields of ModelConfig, besides the vocabulary.
    """
    device = pick_device()
    precision = precision or ("bfloat16" if device.type == "cuda" else "float32")
    train = TrainConfig(precision=precision, compile=compiled)  # type: ignore[arg-type]
    return build_engine(RunConfig(model=ModelConfig(vocab_size=VOCABULARY, **sizes), train=train), device)


def draw_tokens(sequences: int, length: int) -> torch.Tensor:
    """Random ids of a batch, (sequences, length + 1)."""
    return torch.randint(0, VOCABULARY, (sequences, length + 1))


def take_step(engine: Engine, tokens: torch.Tensor, plan: DepthPlan) -> dict[str, torch.Tensor]:
    """Run forward and backward, clip, step, and return the losses.

    Args:
        engine: its model is trained.
        tokens: (sequences, length + 1).
        plan: T of each sequence, and k.
    """
    losses = engine.forward_backward([MicroBatch(Batch(tokens), plan)])
    engine.clip(MAX_NORM)
    engine.step(LR)
    return losses
