"""The data of a run behind one object: opened and checked, read from any position, noted in checkpoints and compared."""

from pathlib import Path
from typing import Any

import torch

from megatron_rdt.config import CorpusConfig, RunConfig
from megatron_rdt.config.mixture_weights import integer_weights
from megatron_rdt.data import (
    Batch,
    BatchLoader,
    CorpusManifest,
    PackedCorpus,
    TokenCorpus,
    load_manifest,
    open_corpus,
    read_fixed_windows,
)
from megatron_rdt.data.mixture import Mixture, MixtureOrder, Phase
from megatron_rdt.data.packing_plan import make_plans
from megatron_rdt.data.shard_files.open_shards import open_shards_limit
from megatron_rdt.errors import CheckpointError, ConfigError, DataError, RdtError
from megatron_rdt.object_collectives import gather_objects
from megatron_rdt.train.data.history import SAME_OR_NEW, CorpusRecord, DataHistory, continued, shown


class RunData:
    """The data of a run; the same object on every rank.

    Args:
        config: the run's config.
        world_size: number of processes with samples of their own.
        local_rank: number of this process on its node; the first one reads every byte where `data.verify` is full.

    Attributes:
        mixture: the training splits and the order of their samples.
        validation: windows of each corpus's validation split by name, the same number of each; empty where the run does
            not evaluate. The number is a multiple of the world size, since forward passes under sharding are collective.
        tokenizer_directory: of the corpora.

    Raises:
        ConfigError: the vocabulary or the number of processes does not fit the data, or the corpora do not fit together.
        DataError: the data is missing, damaged or too small.
    """

    def __init__(self, config: RunConfig, world_size: int, local_rank: int = 0) -> None:
        self.config, self.world_size = config, world_size
        self.settings = {corpus.name: corpus for corpus in config.data.corpora()}
        manifests = {c.name: _verified(c.path, config.data.verify, local_rank) for c in self.settings.values()}
        _check_tokenizers(list(manifests.values()), config.model.vocab_size)
        self.tokenizer_directory = next(iter(manifests.values())).directory / "tokenizer"
        if config.data.pack == "bestfit":
            _plan(manifests, config.train.sequence_length, local_rank)
        corpora = {name: self._open(manifest, "train", self.settings[name]) for name, manifest in manifests.items()}
        records = {
            name: CorpusRecord(manifest.fingerprint, self.settings[name].max_tokens, manifest.shard_hashes)
            for name, manifest in manifests.items()
        }
        phase = Phase(0, integer_weights({name: corpus.weight for name, corpus in self.settings.items()}))
        self._go_on(DataHistory([phase], records), corpora)
        self.validation = {
            name: self._validation(manifest) for name, manifest in manifests.items() if config.eval.every
        }

    def _open(self, manifest: CorpusManifest, split: str, settings: CorpusConfig) -> TokenCorpus:
        config = self.config
        return open_corpus(
            manifest,
            split,
            config.train.sequence_length,
            config.run.seed,
            config.data,
            # Validation takes windows of the stream whatever the packing is: losses of runs can be compared.
            pack=split == "train",
            max_tokens=settings.max_tokens if split == "train" else 0,
            max_open=max(1, open_shards_limit() // len(self.settings)),
        )

    def _go_on(self, history: DataHistory, corpora: dict[str, TokenCorpus]) -> None:
        """Take the samples from `corpora` in the phases of `history`."""
        self.history = history
        order = MixtureOrder(history.phases)
        for number, name in enumerate(order.names):
            if name in corpora:
                corpora[name].order = corpora[name].order.with_number(number)
        self.mixture = Mixture(order, corpora, self.config.run.seed)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each corpus in the samples from here on, by name."""
        return {name: self.mixture.order.phases[-1].share(name) for name in self.settings}

    def _validation(self, manifest: CorpusManifest) -> Batch:
        config, length, processes, n = (
            self.config,
            self.config.train.sequence_length,
            self.world_size,
            len(self.settings),
        )
        tokens = manifest.document["splits"]["valid"]["tokens"]
        needed = (processes + 1) * length  # windows leave out what follows the last whole one
        if tokens < needed:
            raise ConfigError(
                f"the validation split of {manifest.directory} has {tokens:,} tokens, a window of {length} for each of "
                f"{processes} processes with samples of their own needs {needed:,}. Prepare it with a larger "
                "--valid_fraction, or set --eval.every 0."
            )
        if config.eval.sequences < processes * n:
            of_each = f" for each of {n} corpora" if n > 1 else ""
            raise ConfigError(
                f"eval.sequences is {config.eval.sequences}, fewer than {processes} processes with samples of their own"
                f"{of_each}. Raise it."
            )
        split = self._open(manifest, "valid", CorpusConfig("", 1.0))
        windows = read_fixed_windows(split, config.eval.sequences // n, processes)
        split.close()
        return windows

    def loader(self, consumed: int, total: int, place: int, device: torch.device) -> BatchLoader:
        """The batches of a process from sample `consumed` to `total` of the whole run.

        Args:
            consumed: samples before.
            total: samples at the end of the run.
            place: number of this process among those with samples of their own.
            device: where the batches go.

        Raises:
            ConfigError: the run goes over a corpus more often than it may.
        """
        self._check_epochs(total)
        return BatchLoader(
            self.mixture, self.config.train.global_batch, place, self.world_size, consumed, total, device
        )

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over each corpus after `samples` samples of the run."""
        drawn = self.mixture.order.count_per_corpus(samples)
        return {name: drawn[name] / corpus.samples_per_epoch for name, corpus in self.mixture.corpora.items()}

    def _check_epochs(self, total: int) -> None:
        epochs, drawn = self.epochs(total), self.mixture.order.count_per_corpus(total)
        limits = {name: settings.max_epochs or 0.0 for name, settings in self.settings.items()}
        over = [name for name in epochs if epochs[name] > limits[name]]
        if not over:
            return
        name = over[0]
        corpus, whose = self.mixture.corpora[name], "data." if len(self.settings) == 1 else "its "
        text = (
            f"the run takes {drawn[name]:,} samples, {epochs[name]:.2f} epochs of the {corpus.samples_per_epoch:,} in "
            f"{corpus.manifest.directory}, more than {whose}max_epochs {limits[name]:g}. "
        )
        if len(self.settings) == 1:
            raise ConfigError(f"{text}Prepare more text, lower --train.steps, or raise --data.max_epochs.")
        rows = [("corpus", "weight", "samples", "epochs", "max_epochs")]
        rows += [(n, shown(self.shares[n]), f"{drawn[n]:,}", f"{epochs[n]:.2f}", f"{limits[n]:g}") for n in epochs]
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows
        ]
        advice = "Lower its weight or --train.steps, prepare more text, or raise its max_epochs. The whole run:"
        raise ConfigError("\n  ".join([f"{text}{advice}", *table]))

    def describe(self, total: int) -> list[str]:
        """The mixture and the packing of a run of `total` samples in words, in lines; none for one corpus in windows."""
        lines, several = [], len(self.settings) > 1
        if several:
            epochs = self.epochs(total)
            parts = [f"{name} {shown(share)} ({epochs[name]:.3g} epochs)" for name, share in self.shares.items()]
            lines.append(f"data mixture: {', '.join(parts)}")
        for name, corpus in self.mixture.corpora.items():
            if isinstance(corpus, PackedCorpus):
                lines.append(f"{name} " * several + corpus.counts.describe(self.config.train.sequence_length))
        return lines

    def progress(self, consumed: int) -> dict[str, Any]:
        """What a step's record says of the data after `consumed` samples: nothing for a run on one corpus."""
        order = self.mixture.order
        return (
            {"sources": order.count_per_corpus(consumed), "epochs": self.epochs(consumed)}
            if len(order.names) > 1
            else {}
        )

    def state(self, consumed: int) -> dict[str, Any]:
        """What a checkpoint remembers after `consumed` samples."""
        config = self.config
        return self.history.state(
            consumed, sequence_length=config.train.sequence_length, seed=config.run.seed, packing=config.data.pack
        )

    def rank_state(self, consumed: int) -> dict[str, Any] | None:
        """What a checkpoint remembers of this process alone: nothing."""
        return None

    def resume(self, source: Path, state: dict[str, Any]) -> list[str]:
        """Go on where a checkpoint was; what changed in the data since, in words.

        Args:
            source: the checkpoint.
            state: what `state` gave when it was saved.

        Raises:
            CheckpointError: it was trained on other data, or in another order.
        """
        config, consumed = self.config, state["consumed_samples"]
        if "stream" in state:
            raise CheckpointError(
                f"{source} was trained on {state['stream']['data.path']}, read as it comes. {SAME_OR_NEW}"
            )
        for key, mine in (("sequence_length", config.train.sequence_length), ("seed", config.run.seed)):
            if state[key] != mine:
                raise CheckpointError(
                    f"{source} was trained with {key} {state[key]}, now it is {mine}: the order of the data would "
                    f"change. {SAME_OR_NEW}"
                )
        packing = state.get("packing", "chunk")  # checkpoints of before 0.2.0 know of no other
        if packing != config.data.pack:
            raise CheckpointError(
                f"{source} was trained with data.pack {packing}, now it is {config.data.pack}: its samples would be others. "
                f"Set --data.pack {packing}, or start a new --run.name."
            )
        paths = {name: settings.path for name, settings in self.settings.items()}
        before, may_add = DataHistory.read(state), bool(config.data.mixture)
        history, changed = continued(source, before, self.history, paths, consumed, may_add)
        self._go_on(history, self.mixture.corpora)
        return changed


def _check_tokenizers(manifests: list[CorpusManifest], vocab_size: int) -> None:
    """ConfigError where corpora have different tokenizers, or one that does not fit the model."""
    first = manifests[0]
    for other in manifests[1:]:
        if other.document["tokenizer"]["fingerprint"] != first.document["tokenizer"]["fingerprint"]:
            raise ConfigError(
                f"{first.directory} and {other.directory} were made with different tokenizers "
                f"({first.vocab_size:,} and {other.vocab_size:,} pieces). Prepare one with the tokenizer of the other: "
                f"rdt prep --tokenizer {first.directory / 'tokenizer'}."
            )
    if first.vocab_size != vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but the tokenizer of {first.directory} has {first.vocab_size} pieces. "
            f"Set --model.vocab_size {first.vocab_size}."
        )


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
        failure = next((found for found in gather_objects(failure) if found is not None), None)
    if failure is not None:
        raise failure
    return manifest


def _plan(manifests: dict[str, CorpusManifest], length: int, local_rank: int) -> None:
    """Have the packing plans: the first process of a node makes what is missing, the others wait for it."""
    failure: RdtError | None = None
    if local_rank == 0:
        try:
            for manifest in manifests.values():
                make_plans(manifest, "train", length)
        except RdtError as error:
            failure = error
    failure = next((found for found in gather_objects(failure) if found is not None), None)
    if failure is not None:
        raise failure
