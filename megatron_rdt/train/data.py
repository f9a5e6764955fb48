"""The data of a run behind one object: opened and checked, read from any position, noted in checkpoints and compared."""

from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint.together import gather
from megatron_rdt.config import RunConfig
from megatron_rdt.data import (
    BatchLoader,
    CorpusManifest,
    TokenCorpus,
    Windows,
    fixed_windows,
    load_manifest,
    open_corpus,
    shard_difference,
)
from megatron_rdt.data.packing import make_plans
from megatron_rdt.errors import CheckpointError, ConfigError, DataError, RdtError

STATE_VERSION = 1


class RunData:
    """The data of a run; the same object on every rank.

    Args:
        config: the run's config.
        world_size: number of processes with samples of their own.
        local_rank: number of this process on its node; the first one reads every byte where `data.verify` is full.

    Attributes:
        validation: windows of the validation split; None where the run does not evaluate. Their number is a multiple of
            the world size, since forward passes under sharding are collective.
        tokenizer_directory: of the corpus.
        notes: what to say of the data at the start, in lines; of the first process.

    Raises:
        ConfigError: the vocabulary or the number of processes does not fit the data.
        DataError: the data is missing, damaged or too small.
    """

    def __init__(self, config: RunConfig, world_size: int, local_rank: int = 0) -> None:
        self.config, self.world_size, self.notes = config, world_size, list[str]()
        path, data = config.data.path, config.data
        manifest = _verified(path, data.verify, local_rank)
        if data.pack == "bestfit":
            self._planned(manifest, local_rank)
        self.corpus = self._open(manifest, "train")
        self.tokenizer_directory = self.corpus.tokenizer_directory
        if self.corpus.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {path} has "
                f"{self.corpus.vocab_size} pieces. Set --model.vocab_size {self.corpus.vocab_size}."
            )
        self.validation = self._validation(manifest) if config.eval.every else None

    def _open(self, manifest: CorpusManifest, split: str) -> TokenCorpus:
        config = self.config
        length, seed = config.train.sequence_length, config.run.seed
        # Validation takes windows of the stream whatever the packing is, so that losses of runs can be compared.
        return open_corpus(manifest, split, length, seed, config.data, pack=split == "train")

    def _planned(self, manifest: CorpusManifest, local_rank: int) -> None:
        """Have the packing plans: the first process of a node makes what is missing, the others wait for it."""
        failure: Exception | None = None
        if local_rank == 0:
            try:
                counts = make_plans(manifest, "train", self.config.train.sequence_length)
                self.notes.append(counts.describe(self.config.train.sequence_length))
            except (RdtError, OSError) as error:
                failure = error
        failure = next((found for found in gather(failure) if found is not None), None)
        if failure is not None:
            raise failure

    def _validation(self, manifest: CorpusManifest) -> Windows:
        config, length, processes = self.config, self.config.train.sequence_length, self.world_size
        tokens = manifest.document["splits"]["valid"]["tokens"]
        needed = (processes + 1) * length  # windows leave out what follows the last whole one
        if tokens < needed:
            raise ConfigError(
                f"the validation split of {manifest.directory} has {tokens:,} tokens, a window of {length} for each of "
                f"{processes} processes with samples of their own needs {needed:,}. Prepare it with a larger "
                "--valid_fraction, or set --eval.every 0."
            )
        split = self._open(manifest, "valid")
        windows = fixed_windows(split, config.eval.sequences)
        split.close()
        if len(windows) < processes:
            raise ConfigError(
                f"eval.sequences is {config.eval.sequences}, fewer than {processes} processes with samples of their own. "
                "Raise it."
            )
        return windows[: len(windows) // processes * processes]

    def loader(self, consumed: int, total: int, place: int, device: torch.device) -> BatchLoader:
        """The batches of a process from sample `consumed` to `total` of the whole run.

        Args:
            consumed: samples before.
            total: samples at the end of the run.
            place: number of this process among those with samples of their own.
            device: where the batches go.

        Raises:
            ConfigError: the run goes over the corpus more often than `data.max_epochs`.
        """
        corpus, limit = self.corpus, self.config.data.max_epochs
        epochs = total / corpus.samples_per_epoch
        if epochs > limit:
            raise ConfigError(
                f"the run takes {total:,} samples, {epochs:.2f} epochs of the {corpus.samples_per_epoch:,} in "
                f"{corpus.manifest.directory}, more than data.max_epochs {limit}. Prepare more text, lower "
                "--train.steps, or raise --data.max_epochs."
            )
        return BatchLoader(corpus, self.config.train.global_batch, place, self.world_size, consumed, total, device)

    def state(self, consumed: int) -> dict[str, Any]:
        """What a checkpoint remembers after `consumed` samples."""
        return {
            "version": STATE_VERSION,
            "consumed_samples": consumed,
            "data_fingerprint": self.corpus.fingerprint,
            "shards": self.corpus.manifest.shard_hashes,
            "sequence_length": self.config.train.sequence_length,
            "seed": self.config.run.seed,
            "packing": self.config.data.pack,
        }

    def resume(self, source: Path, state: dict[str, Any]) -> list[str]:
        """Go on where a checkpoint was; what changed in the data since, in words.

        Args:
            source: the checkpoint.
            state: what `state` gave when it was saved.

        Raises:
            CheckpointError: it was trained on other data, or in another order.
        """
        packing = state.get("packing", "chunk")  # checkpoints of before 0.2.0 lack it
        if packing != self.config.data.pack:
            raise CheckpointError(
                f"{source} was trained with data.pack {packing}, now it is {self.config.data.pack}: its samples would be "
                f"others. Set --data.pack {packing}, or start a new --run.name."
            )
        for key, mine in (
            ("data_fingerprint", self.corpus.fingerprint),
            ("sequence_length", self.config.train.sequence_length),
            ("seed", self.config.run.seed),
        ):
            if state[key] == mine:
                continue
            change = f"{key} {state[key]}, now it is {mine}"
            if key == "data_fingerprint" and "shards" in state:  # checkpoints of before 0.1.0 may lack them
                difference = shard_difference(state["shards"], self.corpus.manifest.shard_hashes)
                change = f"other data than {self.config.data.path} holds now ({key}): {difference}"
            raise CheckpointError(
                f"{source} was trained with {change}: the order of the data would change. "
                "Use the same shards, train.sequence_length and run.seed, or start a new --run.name."
            )
        return []


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
