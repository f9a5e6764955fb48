"""A model ready for use, from a checkpoint."""

from pathlib import Path

import torch

from megatron_rdt.checkpoint import read_model_weights, resolve_checkpoint
from megatron_rdt.config import load_config
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError
from megatron_rdt.model import RecurrentDepthTransformer


def load(checkpoint: str | Path, device: str = "auto") -> tuple[RecurrentDepthTransformer, Tokenizer]:
    """Model and tokenizer of a checkpoint (or of the newest one of a run), in evaluation mode.

    Args:
        checkpoint: a checkpoint directory or a run directory.
        device: "auto" takes a GPU where there is one.
    """
    return load_verified(resolve_checkpoint(checkpoint), device)


def load_verified(directory: Path, device: str = "auto") -> tuple[RecurrentDepthTransformer, Tokenizer]:
    """`load` of a checkpoint directory that `resolve_checkpoint` returned."""
    config = load_config(directory / "config.yaml")
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    weights = read_model_weights(directory)
    missing = {name for name, _ in model.named_parameters()} ^ set(weights)
    if missing:
        raise CheckpointError(
            f"{directory} does not fit its own config: {sorted(missing)[:3]}. Use another checkpoint."
        )
    model.load_state_dict(weights, assign=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), Tokenizer(directory / "tokenizer")
