"""What a run is refused for before it starts: data that does not fit, or a run directory that holds another run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.together import gather
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.data import (
    CorpusManifest,
    TokenCorpus,
    fixed_documents,
    fixed_windows,
    load_manifest,
    shard_difference,
)
from megatron_rdt.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        corpus: the training split.
        validation: windows of the validation split, int64 (n, L + 1); None where the run does not evaluate. Their
            number is a multiple of the world size, since forward passes under sharding are collective.
        documents: the document of each of their tokens, where `data.document_mask` is set.
    """

    corpus: TokenCorpus
    validation: torch.Tensor | None
    documents: torch.Tensor | None = None


def open_data(config: RunConfig, world_size: int, local_rank: int = 0) -> RunData:
    """Open both splits and compare them with the config; on every rank.

    Args:
        config: the run's config.
        world_size: number of processes with samples of their own.
        local_rank: number of this process on its node; the first one reads every byte where `data.verify` is full.

    Raises:
        ConfigError: the vocabulary or the number of processes does not fit the data.
        DataError: the data is missing, damaged or too small.
    """
    path, length, seed = config.data.path, config.train.sequence_length, config.run.seed
    manifest = _verified(path, config.data.verify, local_rank)
    corpus = TokenCorpus(manifest, "train", length, seed)
    if corpus.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {path} has {corpus.vocab_size} pieces. "
            f"Set --model.vocab_size {corpus.vocab_size}."
        )
    if not config.eval.every:
        return RunData(corpus, None)
    tokens = manifest.document["splits"]["valid"]["tokens"]
    needed = (world_size + 1) * length  # `fixed_windows` leaves out what follows the last whole window
    if tokens < needed:
        raise ConfigError(
            f"the validation split of {path} has {tokens:,} tokens, a window of {length} for each of {world_size} processes "
            f"with samples of their own needs {needed:,}. Prepare it with a larger --valid_fraction, or set --eval.every 0."
        )
    split = TokenCorpus(manifest, "valid", length, seed)
    windows = fixed_windows(split, config.eval.sequences)
    documents = fixed_documents(split, config.eval.sequences) if config.data.document_mask else None
    split.close()
    if len(windows) < world_size:
        raise ConfigError(
            f"eval.sequences is {config.eval.sequences}, fewer than {world_size} processes with samples of their own. Raise it."
        )
    used = len(windows) // world_size * world_size
    return RunData(corpus, windows[:used], None if documents is None else documents[:used])


def _verified(path: str, level: str, local_rank: int) -> CorpusManifest:
    """The manifest of the data, after comparing it with the files; what one process finds by reading, all raise."""
    failure: DataError | None = None
    try:
        manifest = load_manifest(path)
        manifest.verify(level if local_rank == 0 else "size")
    except DataError as error:
        failure = error
    except OSError as error:
        failure = DataError(f"{path} cannot be read: {error}. Mend the disk, or name another --data.path.")
    if level == "full":  # the others wait here for those that read
        failure = next((found for found in gather(failure) if found is not None), None)
    if failure is not None:
        raise failure
    return manifest


def refuse_to_overwrite(run_directory: Path, resume: str) -> None:
    """ConfigError where a run would write over the checkpoints of another.

    Args:
        run_directory: `runs/<name>`.
        resume: "none", "auto", or the path to start from, which may be one of this run's own checkpoints.
    """
    # Also those that are damaged: a fresh run beside them would replace or outlive what could still be saved.
    if resume == "auto" or not any((run_directory / checkpoints.CHECKPOINTS).glob("step-*")):
        return
    if resume == "none":
        raise ConfigError(
            f"{run_directory} already holds checkpoints. Continue it with --resume auto, or choose another --run.name."
        )
    source, own = Path(resume).resolve(), run_directory.resolve()
    if source != own and source.parent != own / checkpoints.CHECKPOINTS:
        raise ConfigError(
            f"{run_directory} holds checkpoints of its own, which a run from {resume} would replace. "
            "Choose another --run.name."
        )


def check_resumable(source: Path, state: dict[str, Any], config: RunConfig, corpus: TokenCorpus) -> None:
    """CheckpointError where a run of this config cannot go on from a checkpoint.

    Args:
        source: the checkpoint.
        state: its trainer.json.
        config: of the run.
        corpus: the training split.
    """
    checkpoints.check_same_model(source, config.model)
    optimizer = load_config(source / "config.yaml").optimizer.name
    if optimizer != config.optimizer.name:
        raise CheckpointError(
            f"{source} was trained with optimizer.name {optimizer}, whose state is not that of {config.optimizer.name}. "
            f"Set --optimizer.name {optimizer}."
        )
    if state["step"] > config.train.steps:
        raise CheckpointError(
            f"{source} is at step {state['step']}, but train.steps is {config.train.steps}. Set --train.steps "
            "to the length of the whole run, or name an earlier checkpoint in --resume."
        )
    data = state["data"]
    for key, mine in (
        ("data_fingerprint", corpus.fingerprint),
        ("sequence_length", config.train.sequence_length),
        ("seed", config.run.seed),
    ):
        if data[key] == mine:
            continue
        change = f"{key} {data[key]}, now it is {mine}"
        if key == "data_fingerprint" and "shards" in data:  # checkpoints of before 0.1.0 may lack them
            difference = shard_difference(data["shards"], corpus.manifest.shard_hashes)
            change = f"other data than {config.data.path} holds now ({key}): {difference}"
        raise CheckpointError(
            f"{source} was trained with {change}: the order of the data would change. "
            "Use the same shards, train.sequence_length and run.seed, or start a new --run.name."
        )


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """What differs between two configs of one run, as `train.steps 40 -> 60`; its name and place do not count."""
    return [
        f"{section}.{name} {old} -> {getattr(getattr(now, section), name)}"
        for section in vars(now)
        if section != "run"
        for name, old in vars(getattr(before, section)).items()
        if old != getattr(getattr(now, section), name)
    ]
