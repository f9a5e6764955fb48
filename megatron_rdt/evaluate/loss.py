"""Validation loss at several loop counts."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from megatron_rdt.checkpoint import read_trainer_state, resolve_checkpoint
from megatron_rdt.config import load_config
from megatron_rdt.data import TokenCorpus, Tokenizer, fixed_windows
from megatron_rdt.data.tokenizer import BYTES_FILE
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import write_text
from megatron_rdt.inference.load import load_verified
from megatron_rdt.parallel.engine import loss_sum

EVALUATION = "eval.json"


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    windows: torch.Tensor,
    loops: Sequence[int],
    micro_batch: int,
    device: torch.device,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[int, float]:
    """Mean cross entropy per token at each T.

    Args:
        model: called as model(tokens, T); every rank calls it equally often.
        windows: this rank's windows, int64 (n, L + 1).
        loops: values of T.
        micro_batch: windows per forward pass.
        device: where the model is.
        reduce: sums a tensor over ranks.
        progress: called with 1 after each forward pass.
    """
    losses = {}
    for count in loops:
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for part in windows.split(micro_batch):
            part = part.to(device)
            total[0] += loss_sum(model(part[:, :-1], count), part[:, 1:])
            total[1] += part[:, 1:].numel()
            if progress is not None:
                progress(1)
        if reduce is not None:
            total = reduce(total)
        losses[count] = float(total[0] / total[1])
    return losses


def evaluate_checkpoint(
    checkpoint: str, loops: Sequence[int], sequences: int, data: str | None = None, out: str | None = None
) -> dict[str, Any]:
    """Print a table of the validation loss against T, and write it as JSON.

    Args:
        checkpoint: a checkpoint or a run directory.
        loops: values of T.
        sequences: validation windows to use.
        data: prepared corpus; default the one of the run.
        out: JSON file; default eval.json in the run directory.

    Raises:
        ConfigError: a T or the number of windows is below 1.
        DataError: the corpus was made with another tokenizer than the model's.
    """
    if not loops or min(loops) < 1 or sequences < 1:
        raise ConfigError(
            f"loops are {list(loops)} and sequences {sequences}; give at least one T, and all at least 1."
        )
    directory = resolve_checkpoint(checkpoint)
    config = load_config(directory / "config.yaml")
    model, tokenizer = load_verified(directory)
    device = next(model.parameters()).device
    corpus = TokenCorpus(data or config.data.path, "valid", config.train.sequence_length, config.run.seed)
    if Tokenizer(corpus.tokenizer_directory).fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{corpus.manifest.directory} was made with another tokenizer than {directory}. "
            "Prepare the text with the tokenizer of the run, or leave --data away."
        )
    windows = fixed_windows(corpus, sequences)
    size = np.load(directory / "tokenizer" / BYTES_FILE)[windows[:, 1:].numpy()].sum() / windows[:, 1:].numel()
    batches = -(-len(windows) // config.train.micro_batch)
    with tqdm(total=batches * len(loops), desc="evaluate", unit="batch") as bar:
        losses = validation_losses(model, windows, loops, config.train.micro_batch, device, progress=bar.update)
    print(f"{'T':>4} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}   ({windows[:, 1:].numel():,} tokens)")
    for count, loss in losses.items():
        print(f"{count:>4} {loss:>8.4f} {perplexity(loss):>11.2f} {loss / math.log(2) / size:>10.4f}")
    result = {
        "checkpoint": directory.name,
        "step": read_trainer_state(directory)["step"],
        "sequences": len(windows),
        "bytes_per_token": float(size),
        "losses": {str(count): loss if math.isfinite(loss) else None for count, loss in losses.items()},
    }
    write_text(Path(out) if out else directory.parent.parent / EVALUATION, json.dumps(result, indent=1) + "\n")
    return result
