"""Validation loss at several loop counts."""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from megatron_rdt.checkpoint import read_trainer_state, resolve_checkpoint
from megatron_rdt.config import CorpusConfig, DataConfig, RunConfig, load_config
from megatron_rdt.data import Batch, TokenCorpus, Tokenizer, load_manifest, open_corpus, read_fixed_windows
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST
from megatron_rdt.data.tokenizer.base import BYTES_FILE
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import write_text
from megatron_rdt.inference.load import choose_device, load_verified
from megatron_rdt.run_directory import CHECKPOINTS

EVALUATION = "eval.json"
ANOTHER_OUT = "Choose another --out."


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    windows: Batch,
    loops: Sequence[int],
    micro_batch: int,
    device: torch.device,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[int, float]:
    """Mean cross entropy per counted target at each T.

    Args:
        model: called as model(tokens, T, targets=...), with the further fields of the windows by name; every rank calls
            it equally often.
        windows: this rank's windows.
        loops: values of T.
        micro_batch: windows per forward pass.
        device: where the model is.
        reduce: sums a tensor over ranks.
        progress: called with 1 after each forward pass.
    """
    losses = {}
    for count in loops:
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(0, len(windows), micro_batch):
            tokens, named = windows.rows(first, first + micro_batch).to(device).inputs()
            total[0] += model(tokens, count, **named)["cross_entropy"]
            total[1] += named["loss_mask"].sum() if "loss_mask" in named else tokens.numel()
            if progress is not None:
                progress(1)
        if reduce is not None:
            total = reduce(total)
        losses[count] = float(total[0] / total[1])
    return losses


def mixture_losses(
    model: nn.Module,
    windows: Mapping[str, Batch],
    shares: Mapping[str, float],
    *arguments: Any,
    **named: Any,
) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """The loss of a mixture of corpora: the mean of theirs, weighted by their shares; and that of each.

    Args:
        model: as in `validation_losses`.
        windows: this rank's windows of each corpus, by name.
        shares: of each corpus in the samples of the run; their sum is 1.
        arguments, named: further ones of `validation_losses`.

    Returns:
        Losses by T, and the same by corpus; the latter is empty where there is one.
    """
    of_each = {name: validation_losses(model, part, *arguments, **named) for name, part in windows.items()}
    counts = next(iter(of_each.values()))
    mean = {count: math.fsum(shares[name] * losses[count] for name, losses in of_each.items()) for count in counts}
    return mean, of_each if len(of_each) > 1 else {}


def evaluate_checkpoint(
    checkpoint: str, loops: Sequence[int], sequences: int, data: str | None = None, out: str | None = None
) -> dict[str, Any]:
    """Print a table of the validation loss against T, and write it as JSON.

    Args:
        checkpoint: a checkpoint or a run directory.
        loops: values of T.
        sequences: validation windows to use; all where the split has fewer.
        data: prepared corpus; default the one of the run.
        out: JSON file; default eval.json in the run directory, and none for a checkpoint that lies in no run.

    Raises:
        ConfigError: a T or the number of windows is below 1, or the JSON file cannot be written.
        DataError: there is no corpus, or it was made with another tokenizer than the model's.
    """
    if not loops or min(loops) < 1 or sequences < 1:
        raise ConfigError(
            f"loops are {list(loops)} and sequences {sequences}; give at least one T, and all at least 1."
        )
    if out is not None:
        check_result_file(Path(out))
    directory = Path(os.path.abspath(resolve_checkpoint(checkpoint)))
    target = Path(out) if out is not None else _file_in_run(directory)
    config = load_config(directory / "config.yaml")
    device = choose_device("auto")
    corpora, shares = validation_corpora(config, data)
    model, tokenizer = load_verified(directory, device)
    for corpus in corpora.values():
        if Tokenizer(corpus.tokenizer_directory).fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{corpus.manifest.directory} was made with another tokenizer than {directory}. "
                "Prepare the text with the tokenizer of the run, or leave --data away."
            )
    wanted = max(1, sequences // len(corpora))
    windows = {name: read_fixed_windows(corpus, wanted) for name, corpus in corpora.items()}
    for name, part in windows.items():
        if len(part) < wanted:
            split = "the validation split" if len(windows) == 1 else f"the validation split of {name}"
            print(f"{split} has {len(part)} sequences of {config.train.sequence_length} tokens; all are used")
    sizes = np.load(directory / "tokenizer" / BYTES_FILE)
    targets = {name: part.counted_targets for name, part in windows.items()}
    size = math.fsum(shares[name] * sizes[part.numpy()].mean() for name, part in targets.items())
    micro_batch = config.train.micro_batch
    batches = sum(-(-len(part) // micro_batch) for part in windows.values())
    with tqdm(total=batches * len(loops), desc="evaluate", unit="batch") as bar:
        losses, of_each = mixture_losses(model, windows, shares, loops, micro_batch, device, progress=bar.update)
    count = sum(len(part) for part in windows.values())
    used = f"({count:,} sequences, {sum(map(len, targets.values())):,} tokens)"
    widths = {name: max(8, len(name)) for name in of_each}
    named = "".join(f"  {name:>{width}}" for name, width in widths.items())
    print(f"{'T':>4} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}{named}   {used}")
    for taken, loss in losses.items():
        each = "".join(f"  {of_each[name][taken]:>{width}.4f}" for name, width in widths.items())
        print(f"{taken:>4} {loss:>8.4f} {perplexity(loss):>11.2f} {loss / math.log(2) / size:>10.4f}{each}")
    result = {
        "checkpoint": directory.name,
        "step": read_trainer_state(directory)["step"],
        "sequences": count,
        "bytes_per_token": float(size),
        "losses": _by_text(losses),
        **({"sources": {name: _by_text(values) for name, values in of_each.items()}} if of_each else {}),
    }
    if target is None:
        print(f"{directory} lies in no run, so that no {EVALUATION} was written; --out FILE writes one")
    else:
        write_text(target, json.dumps(result, indent=1) + "\n")
    return result


def _by_text(losses: Mapping[int, float]) -> dict[str, float | None]:
    """Losses by T as JSON holds them."""
    return {str(count): loss if math.isfinite(loss) else None for count, loss in losses.items()}


def _file_in_run(checkpoint: Path) -> Path | None:
    """eval.json of the run that a checkpoint lies in; None where it lies elsewhere, a converted one for example."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not (run / "config.yaml").is_file():
        return None
    if not os.access(run, os.W_OK | os.X_OK):
        raise ConfigError(f"{run} is not writable, {EVALUATION} goes there. Name another file with --out.")
    return run / EVALUATION


def check_result_file(file: Path) -> None:
    """ConfigError where an evaluation cannot be written to `file`, or something else stands there."""
    parent = file.parent
    if not parent.is_dir():
        reason = "is not a directory" if parent.exists() else "does not exist"
        raise ConfigError(f"--out {file} cannot be written: {parent} {reason}. {ANOTHER_OUT}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {file} cannot be written: {parent} is not writable. {ANOTHER_OUT}")
    if file.is_dir():
        raise ConfigError(f"--out {file} is a directory, it must be a file. {ANOTHER_OUT}")
    if file.exists():
        try:
            read_evaluation(file)
        except DataError:
            raise ConfigError(
                f"--out {file} exists and is not an evaluation of `rdt eval`; it is kept as it is. {ANOTHER_OUT}"
            ) from None


def read_evaluation(file: Path) -> tuple[int, dict[int, float]]:
    """The step and the finite losses by T of a file that `evaluate_checkpoint` wrote; DataError where it did not."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        losses = {int(count): float(loss) for count, loss in document["losses"].items() if loss is not None}
        return int(document["step"]), losses
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{file} is not an evaluation of `rdt eval` ({type(error).__name__}: {error}). Remove it or evaluate again."
        ) from None


def validation_corpora(config: RunConfig, data: str | None = None) -> tuple[dict[str, TokenCorpus], dict[str, float]]:
    """The validation splits of a run's corpora and their shares in its samples, by name.

    Args:
        config: of the run.
        data: a prepared corpus to take in their place.

    Raises:
        DataError: see `validation_corpus`.
    """
    settings = [CorpusConfig(data, 1.0, "data")] if data is not None else config.data.corpora()
    length, seed = config.train.sequence_length, config.run.seed
    corpora = {c.name: validation_corpus(c.path, length, seed, config.data) for c in settings}
    total = math.fsum(corpus.weight for corpus in settings)
    return corpora, {corpus.name: corpus.weight / total for corpus in settings}


def validation_corpus(path: str, sequence_length: int, seed: int, options: DataConfig) -> TokenCorpus:
    """The validation split of a prepared corpus, as windows of its stream.

    Raises:
        DataError: there is no corpus, or its validation split is too short for one evaluation.
    """
    if not (Path(path) / MANIFEST).is_file():
        place = shlex.quote(str(path))
        hint = "" if os.path.isabs(path) else f", looked for in {os.getcwd()}"
        raise DataError(f"there is no prepared corpus {place} (no {MANIFEST}{hint}). Name it with --data DIR.")
    manifest = load_manifest(path)
    split = manifest.document.get("splits", {}).get("valid", {})
    if split.get("tokens", 0) < 2 * sequence_length:
        raise DataError(
            f"the validation split of {path} has {split.get('tokens', 0)} tokens, an evaluation with sequences of "
            f"{sequence_length} needs at least {2 * sequence_length}. Prepare more text or with a larger "
            "--valid_fraction, and name that corpus with --data DIR."
        )
    manifest.verify()
    return open_corpus(manifest, "valid", sequence_length, seed, options, pack=False)
