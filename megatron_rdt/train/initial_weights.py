"""Weights that a new run takes from a checkpoint or an export (`--init`): the weights, and nothing else of it.

Rank 0 reads one tensor at a time and broadcasts it, so the files are read once, whatever the number of ranks; each rank
keeps its shard. Any engine takes the weights of any other's checkpoint that way.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.buffers import persistent_buffers
from megatron_rdt.config import ModelConfig, RunConfig, load_saved_config
from megatron_rdt.config.model import TRAINING_FIELDS
from megatron_rdt.convert.hf import check_tokenizer, open_hf
from megatron_rdt.convert.hf_tokenizer import open_exported_tokenizer
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError, RdtError
from megatron_rdt.model import Block, RecurrentDepthTransformer
from megatron_rdt.model.initial_noise import whole_block
from megatron_rdt.object_collectives import broadcast_object
from megatron_rdt.parallel import Engine
from megatron_rdt.train.resume_checks import REACH_FIELDS, describe_changed_settings, describe_model_difference

LISTED_TENSORS = 3
PIECE = 1 << 26  # elements of a tensor that rank 0 sends at a time


class InitialWeights:
    """The weights of a verified checkpoint or of an export, for every rank; they fit the run's model and tokenizer.

    Args:
        source: the checkpoint or export.
        config: of the run.
        engine: of the run, before its `setup`.
        tokenizer_directory: of the tokenizer that made the run's tokens.

    Attributes:
        lines: to print: what was taken, and which settings differ.

    Raises:
        CheckpointError: on every rank: the model or the tokenizer is another one, or the files are damaged.
    """

    def __init__(self, source: Path, config: RunConfig, engine: Engine, tokenizer_directory: Path) -> None:
        self.source, self.engine = source, engine
        self.lines: list[str] = []
        self._stored: checkpoints.StoredWeights | None = None  # on rank 0
        failure: RdtError | None = None
        if engine.rank == 0:
            try:
                self.lines = describe_start(source, config)
                self.lines += _check_tokenizers(source, tokenizer_directory)
                self._stored = _open_fitting_weights(source, config.model)
            except RdtError as error:
                failure = error
            except (Exception, CheckpointException) as error:
                failure = self._explain(error)
        _raise_rank_0_failure(failure)

    def _explain(self, error: BaseException) -> CheckpointError:
        """The error for files that a library cannot read."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"the weights of {self.source} cannot be read: {reason}. Name another in --init.")

    @torch.no_grad()
    def fill(self, name: str, shape: torch.Size, blocks: Sequence[Block]) -> None:
        """Write one tensor into the blocks of it that this rank holds; every rank must call this, in the same order.

        The others get it from rank 0 in runs of rows, so that no device needs memory for a whole one.
        """
        stored, failure = None, None
        if self._stored is not None:
            try:
                stored = self._stored.read(name)
            except (Exception, CheckpointException) as error:
                failure = self._explain(error)
        _raise_rank_0_failure(failure)  # otherwise the others would wait for the tensor for ever
        row, rows = shape[1:], shape[0] if shape else 1
        step = max(1, PIECE // max(1, math.prod(row)))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            piece = torch.empty(stop - start, *row, dtype=torch.float32, device=self.engine.device)
            if stored is not None:
                piece.copy_(stored.view(rows, *row)[start:stop])
            piece = self.engine.broadcast(piece)
            for values, offsets in blocks:
                _copy_overlap(piece, start, values.view(1) if values.dim() == 0 else values, offsets or (0,))

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Copy the persistent buffers into the engine's model, after its `setup`; refuse weights that are not finite.

        Raises:
            CheckpointError: on every rank.
        """
        for name, buffer in persistent_buffers(self.engine.model).items():
            self.fill(name, buffer.shape, [whole_block(buffer)])
        if not self.engine.has_finite_weights():
            raise CheckpointError(
                f"some weights of {self.source} are not finite. Name a checkpoint in --init that was saved before its run "
                "diverged."
            )


def _copy_overlap(rows: torch.Tensor, start: int, values: torch.Tensor, offsets: tuple[int, ...]) -> None:
    """Copy what a block holds of the rows of a tensor that begin at row `start`."""
    first, last = max(start, offsets[0]), min(start + len(rows), offsets[0] + len(values))
    if first < last:
        part = rows[first - start : last - start]
        for dim in range(1, part.dim()):
            part = part.narrow(dim, offsets[dim], values.shape[dim])
        values[first - offsets[0] : last - offsets[0]].copy_(part)


def _raise_rank_0_failure(failure: RdtError | None) -> None:
    """Raise rank 0's failure, if it has one, on every rank; every rank must call this."""
    found = broadcast_object(failure)
    if found is not None:
        raise found


def describe_start(source: Path, config: RunConfig) -> list[str]:
    """Lines on a run of `config` that begins with the weights of `source`.

    Raises:
        CheckpointError: they are of another model, or the settings with which they were saved cannot be read.
    """
    if checkpoints.has_export_weights(source):
        saved, origin = dataclasses.replace(config, model=open_hf(source)[0]), "an export"
    else:
        saved = load_saved_config(source)
        origin = f"step {checkpoints.read_manifest(source)['step']} of {saved.run.name}"
    _check_model(source, saved.model, config.model)
    lines = [f"weights from {source} ({origin}), and nothing else of it: the run begins at step 0"]
    changed = describe_changed_settings(saved, config)
    return [*lines, f"changed since it was saved: {', '.join(changed)}"] if changed else lines


def _check_model(source: Path, saved: ModelConfig, model: ModelConfig) -> None:
    """Raise CheckpointError if the weights of the model `saved` would be others, or mean something else, in `model`."""
    different = describe_model_difference(saved, model, (*TRAINING_FIELDS, *REACH_FIELDS))
    if different:
        tensors = _describe_tensor_differences(_list_shapes(saved), _list_shapes(model))
        tensors = tensors or "its tensors have the same shapes, but would mean something else"
        raise CheckpointError(
            f"{source} is of another model: {'; '.join(different)}; {tensors}. Set these options as there, or begin with "
            "random weights, without --init."
        )


def _list_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter and persistent buffer of a model by name."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in RecurrentDepthTransformer(model).state_dict().items()}


def _describe_tensor_differences(there: Mapping[str, torch.Size], here: Mapping[str, torch.Size]) -> str:
    """Name the first tensors of which two models have one only, or different shapes, and their number; "" if none."""
    different = [name for name in dict.fromkeys((*there, *here)) if there.get(name) != here.get(name)]
    shapes = [[tuple(side[name]) if name in side else "absent" for side in (there, here)] for name in different]
    listed = [f"{name} ({old} there, {new} here)" for name, (old, new) in zip(different, shapes)][:LISTED_TENSORS]
    more = f" and {len(different) - LISTED_TENSORS} more" if len(different) > LISTED_TENSORS else ""
    return f"tensors that differ: {', '.join(listed)}{more}" if different else ""


def _open_fitting_weights(source: Path, model: ModelConfig) -> checkpoints.StoredWeights:
    """Open the weights of a checkpoint or export; CheckpointError if names or shapes are not those of `model`."""
    stored = open_hf(source)[1] if checkpoints.has_export_weights(source) else checkpoints.open_weights(source)
    different = _describe_tensor_differences(stored.shapes, _list_shapes(model))
    if different:
        raise CheckpointError(f"{source} does not fit its own config; {different}. Name another in --init.")
    return stored


def _check_tokenizers(source: Path, directory: Path) -> list[str]:
    """Return a warning if `source` has no tokenizer to compare with that of the run's tokens, in `directory`.

    Raises:
        CheckpointError: they are different tokenizers.
    """
    if checkpoints.has_export_weights(source):
        before = open_exported_tokenizer(source)
        check_tokenizer(source, before)
    elif (source / "tokenizer").is_dir():
        before = Tokenizer(source / "tokenizer")
    else:
        return [f"warning: {source} has no tokenizer to compare with {directory}; the ids have to mean the same text"]
    now = Tokenizer(directory)
    if before.encodes_like(now):
        return []
    folder = before.file.parent
    raise CheckpointError(
        f"{source} was trained with another tokenizer ({before.vocab_size:,} pieces) than {directory} "
        f"({now.vocab_size:,} pieces): its embeddings would be those of other text. Prepare the text with that tokenizer, "
        f"rdt prep --tokenizer {folder}, or stream it with --data.tokenizer {folder}; and set --model.vocab_size "
        f"{before.vocab_size}."
    )
