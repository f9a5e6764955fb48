"""Validation loss at several loop counts: of a model in memory, and of a checkpoint (`rdt eval`)."""

import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_rdt.checkpoint import read_from_checkpoint, read_trainer_state
from megatron_rdt.config import CorpusConfig, DataConfig, RunConfig, load_saved_config
from megatron_rdt.data import Batch, TokenCorpus, Tokenizer, load_manifest, open_corpus, read_fixed_windows
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST, CorpusManifest
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.evaluate.loop_curve import LoopCurve
from megatron_rdt.evaluate.result_files import (
    Extent,
    check_result_file,
    choose_result_file,
    explain_no_file,
    invalid_result,
    keep_better_result,
    write_result,
)
from megatron_rdt.evaluate.row_scores import count_forward_passes, score_rows
from megatron_rdt.inference.load import choose_device, load_verified
from megatron_rdt.run_directory import WeightKind
from megatron_rdt.terminal import show_progress
from megatron_rdt.untrusted_files import read_json

EVALUATION = "eval.json"


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def measure_losses(
    model: nn.Module,
    windows: Batch,
    loops: Sequence[int],
    micro_batch: int,
    device: torch.device,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[int, float]:
    """Return the mean cross entropy per counted target at each T.

    Args:
        model: called as model(tokens, loops=[...], targets=...), with the further fields of the windows by name; every rank
            calls it equally often.
        windows: this rank's windows.
        loops: values of T.
        micro_batch: windows per forward pass.
        device: where the model is.
        reduce: sums a tensor over ranks.
        progress: called with 1 after each forward pass.
    """
    rising = sorted({*loops})
    totals = torch.zeros(len(rising) + 1, dtype=torch.float64, device=device)  # sums of the losses, number of targets
    for first in range(0, len(windows), micro_batch):
        tokens, named = windows.rows(first, first + micro_batch).to(device).inputs()
        totals[:-1] += model(tokens, loops=rising, **named)["cross_entropy"]
        totals[-1] += named["loss_mask"].sum() if "loss_mask" in named else tokens.numel()
        if progress is not None:
            progress(1)
    if reduce is not None:
        totals = reduce(totals)
    means = (totals[:-1] / totals[-1]).tolist()
    return {t: means[rising.index(t)] for t in loops}


def measure_mixture_losses(
    model: nn.Module,
    windows: Mapping[str, Batch],
    shares: Mapping[str, float],
    *arguments: Any,
    **named: Any,
) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """Return losses by T, each the mean of the corpora weighted by `shares`, and the losses by corpus and T.

    Args:
        model: as in `measure_losses`.
        windows: this rank's windows of each corpus, by name.
        shares: of each corpus in the samples of the run; their sum is 1.
        arguments, named: further ones of `measure_losses`.

    Returns:
        Losses by T, and losses by corpus and T; the latter is empty if there is only one corpus.
    """
    by_corpus = {name: measure_losses(model, part, *arguments, **named) for name, part in windows.items()}
    loops = next(iter(by_corpus.values()))
    mean = {t: math.fsum(shares[name] * losses[t] for name, losses in by_corpus.items()) for t in loops}
    return mean, by_corpus if len(by_corpus) > 1 else {}


def evaluate_checkpoint(
    checkpoint: str,
    loops: Sequence[int],
    sequences: int,
    data: str | None = None,
    out: str | None = None,
    sequence_length: int = 0,
    weights: WeightKind = "model",
) -> dict[str, Any]:
    """Print a table of the validation loss against T; write losses, step and counts as JSON, and return them.

    Args:
        checkpoint: a checkpoint or a run directory.
        loops: values of T.
        sequences: validation windows to use; all of them if the split has fewer.
        data: prepared corpus; by default the run's own.
        out: JSON file; by default eval.json in the run directory, and none for a checkpoint outside a run.
        sequence_length: tokens of a window; 0 means as many as in training.
        weights: "ema" for the average of the weights; it then has no file without `out`.

    Raises:
        ConfigError: a T or the number of windows is below 1, or the JSON file cannot be written.
        DataError: there is no corpus, or it was made with another tokenizer than the model's.
    """
    if not loops or min(loops) < 1 or sequences < 1:
        given = f"loops are {list(loops)} and sequences {sequences}"
        raise ConfigError(f"{given}; give at least one T, and all at least 1.")
    file = check_result_file(out, read_evaluation)
    device = choose_device("auto")

    def read(found: Path) -> tuple[Any, ...]:
        """Read from a checkpoint all that the evaluation needs of it: its run may delete it before the end."""
        directory = Path(os.path.abspath(found))
        target = choose_result_file(directory, EVALUATION, file, weights)
        config = load_saved_config(directory)
        if sequence_length:
            config = replace(config, train=replace(config.train, sequence_length=sequence_length))
        opened = open_validation_corpora(config, data)
        step = read_trainer_state(directory)["step"]
        return directory, target, config, opened, step, load_verified(directory, device, weights)

    directory, target, config, (corpora, shares), step, (model, tokenizer) = read_from_checkpoint(checkpoint, read)
    if out is None:
        extent = Extent(step, sequences, frozenset((t, name_corpus(data), sequence_length) for t in loops))
        target = keep_better_result(target, extent, _measure_extent, explain_no_file(directory, EVALUATION, weights))
    sizes = tokenizer.token_bytes()
    for corpus in corpora.values():
        check_same_tokenizer(corpus.manifest, tokenizer, directory)
    windows = _read_windows(corpora, max(1, sequences // len(corpora)))
    # The loss per byte needs the mean size of a target, weighted like the loss.
    targets = {name: part.counted_targets for name, part in windows.items()}
    bytes_per_token = math.fsum(shares[name] * sizes[part.numpy()].mean() for name, part in targets.items())
    micro_batch = config.train.micro_batch
    passes = sum(count_forward_passes(len(part), micro_batch) for part in windows.values())
    with show_progress(passes, "evaluate", "batches") as advance:
        by_name = {
            name: score_rows(model, part, loops, micro_batch, device, progress=advance)
            for name, part in windows.items()
        }
    curve = LoopCurve({t: {name: scores[t] for name, scores in by_name.items()} for t in loops}, shares)
    by_corpus = curve.by_corpus if len(windows) > 1 else {}
    result = {
        "checkpoint": directory.name,
        **({} if weights == "model" else {"weights": weights}),
        "step": step,
        "sequences": sum(map(len, windows.values())),
        **({"sequence_length": sequence_length} if sequence_length else {}),
        **({"data": name_corpus(data)} if data is not None else {}),
        "bytes_per_token": float(bytes_per_token),
        "losses": _name_loops(curve.losses),
        "standard_errors": _name_loops(curve.standard_errors),
        **({"sources": {name: _name_loops(values) for name, values in by_corpus.items()}} if by_corpus else {}),
        **curve.summarize(),
    }
    if target is not None:  # before anything is printed, which fails where the reader has gone
        write_result(target, result)
    note = f"({describe_windows(windows.values())})"
    print("\n".join([_format_table(curve, by_corpus, bytes_per_token, note), *result.get("summary", [])]))
    return result


def check_same_tokenizer(manifest: CorpusManifest, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Raise DataError if a corpus was made with another tokenizer than a checkpoint's."""
    if not tokenizer.encodes_like(Tokenizer(manifest.directory / "tokenizer")):
        raise DataError(
            f"{manifest.directory} was made with another tokenizer than {checkpoint}. "
            "Prepare the text with the tokenizer of the run, or omit --data."
        )


def describe_windows(parts: Iterable[Batch]) -> str:
    """Return how many sequences and counted targets an evaluation has: "16 sequences, 1,024 tokens"."""
    parts = list(parts)
    return format_window_counts(sum(map(len, parts)), sum(len(part.counted_targets) for part in parts))


def format_window_counts(windows: int, targets: int) -> str:
    """Return the text of `describe_windows`."""
    return f"{windows:,} sequences, {targets:,} tokens"


def _read_windows(corpora: Mapping[str, TokenCorpus], count: int) -> dict[str, Batch]:
    """Read up to `count` windows of each corpus, spread evenly over its split; print which corpora have fewer."""
    windows = {name: read_fixed_windows(corpus, count) for name, corpus in corpora.items()}
    for name, part in windows.items():
        if len(part) < count:
            split = "the validation split" if len(windows) == 1 else f"the validation split of {name}"
            print(f"{split} has {len(part)} sequences of {corpora[name].sequence_length} tokens; all are used")
    return windows


def _format_table(
    curve: LoopCurve, by_corpus: Mapping[str, Mapping[int, float]], bytes_per_token: float, note: str
) -> str:
    """Return one line per T: loss, perplexity, bits per byte, the loss's standard error, and the loss of each corpus.

    `note` ends the header.
    """
    widths = {name: max(8, len(name)) for name in by_corpus}
    names = "".join(f"  {name:>{width}}" for name, width in widths.items())
    lines = [f"{'T':>4} {'loss':>8} {'perplexity':>11} {'bits/byte':>10} {'+-':>7}{names}   {note}"]
    for t, (loss, error) in curve.means.items():
        bits = loss / math.log(2) / bytes_per_token
        cells = "".join(f"  {by_corpus[name][t]:>{width}.4f}" for name, width in widths.items())
        lines.append(f"{t:>4} {loss:>8.4f} {perplexity(loss):>11.2f} {bits:>10.4f} {error:>7.4f}{cells}")
    return "\n".join(lines)


def _name_loops(values: Mapping[int, float]) -> dict[str, float]:
    """Return numbers by T with text keys, as JSON requires."""
    return {str(loops): value for loops, value in values.items()}


class Evaluation(NamedTuple):
    """Losses of one step."""

    step: int
    losses: dict[int, float]
    """By T, the finite ones."""
    standard_errors: dict[int, float]
    """By T, the finite ones; empty where they were not measured."""
    summary: list[str]
    """Sentences on what the loops bought."""
    sequences: int = 0
    """Windows; 0 where that is not recorded."""
    sequence_length: int = 0
    """Tokens of a window; 0 means as many as in training."""
    data: str = ""
    """Name of the corpus, where it is not the run's own."""


def read_evaluation(file: Path) -> Evaluation:
    """Read a file that `evaluate_checkpoint` wrote.

    Raises:
        DataError: the file is something else.
    """
    try:
        document = read_json(file)
        losses, errors = (
            {int(count): float(value) for count, value in values.items() if value is not None}
            for values in (document["losses"], document.get("standard_errors", {}))
        )
        summary = [str(text) for text in document.get("summary", [])]
        count, length = (int(document.get(name, 0)) for name in ("sequences", "sequence_length"))
        data = str(document.get("data", ""))
        return Evaluation(int(document["step"]), losses, errors, summary, count, length, data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise invalid_result(file, error) from None


def _measure_extent(file: Path) -> Extent:
    """Return what the losses in a file cover."""
    found = read_evaluation(file)
    scores = frozenset((t, found.data, found.sequence_length) for t in found.losses)
    return Extent(found.step, found.sequences, scores)


def name_corpus(data: str | None) -> str:
    """Return the name of a corpus that takes the place of the run's own, as results record it; "" for the run's own."""
    return "" if data is None else Path(os.path.abspath(data)).name


def open_validation_corpora(
    config: RunConfig, data: str | None = None
) -> tuple[dict[str, TokenCorpus], dict[str, float]]:
    """Open the validation splits of a run's corpora; return them and their shares of its samples, by name.

    Args:
        config: of the run.
        data: a prepared corpus to use instead.

    Raises:
        DataError: see `open_validation_corpus`.
    """
    settings = [CorpusConfig(data, 1.0, "data")] if data is not None else config.data.corpora()
    length, seed = config.train.sequence_length, config.run.seed
    corpora = {c.name: open_validation_corpus(c.path, length, seed, config.data) for c in settings}
    total = math.fsum(corpus.weight for corpus in settings)
    return corpora, {corpus.name: corpus.weight / total for corpus in settings}


def open_validation_corpus(path: str, sequence_length: int, seed: int, options: DataConfig) -> TokenCorpus:
    """Open the validation split of a prepared corpus: windows of its token stream, or examples with `data.pack: example`.

    Raises:
        DataError: there is no corpus, or its validation split is too short for one evaluation.
    """
    check_corpus_exists(path)
    manifest = load_manifest(path)
    tokens = manifest.document.get("splits", {}).get("valid", {}).get("tokens", 0)
    if tokens < 2 * sequence_length and options.pack != "example":
        raise DataError(
            f"the validation split of {path} has {tokens} tokens, an evaluation with sequences of {sequence_length} needs "
            f"at least {2 * sequence_length}. Prepare more text or with a larger --valid_fraction, and name that corpus "
            "with --data DIR; or lower --sequence_length of rdt eval."
        )
    manifest.verify()
    return open_corpus(manifest, "valid", sequence_length, seed, options, pack=False)


def check_corpus_exists(path: str) -> None:
    """Raise DataError if there is no prepared corpus at `path`."""
    if not (Path(path) / MANIFEST).is_file():
        hint = "" if os.path.isabs(path) else f", looked for in {os.getcwd()}"
        corpus = f"{shlex.quote(str(path))} (no {MANIFEST}{hint})"
        raise DataError(f"there is no prepared corpus {corpus}. Name it with --data DIR.")
