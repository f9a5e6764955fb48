"""Training data from prepared corpora: a mixture of token shards in a computed order, readable from any position."""

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.mixture_weights import integer_weights
from megatron_rdt.config.step_ranges import add_step_ranges
from megatron_rdt.data import BatchLoader, CorpusManifest, PackedCorpus, TokenCorpus, open_corpus
from megatron_rdt.data.corpus import check_targets, read_window_share
from megatron_rdt.data.mixture import Mixture, MixtureOrder, Phase
from megatron_rdt.data.shard_files.open_shards import open_shards_limit
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.data.unreadable import PatientReader
from megatron_rdt.errors import CheckpointError, ConfigError, DataError, suggest_init
from megatron_rdt.evaluate.tasks import read_groups
from megatron_rdt.object_collectives import (
    broadcast_object,
    gather_objects,
    rank_and_world_size,
    work_while_others_wait,
)
from megatron_rdt.terminal import align_columns
from megatron_rdt.train.data.base import ValidationWindows, check_vocabulary
from megatron_rdt.train.data.batch_history import continue_batches, write_batches
from megatron_rdt.train.data.history import (
    CorpusRecord,
    DataHistory,
    continue_history,
    format_share,
    suggest_same_data,
)
from megatron_rdt.train.data.shared_manifests import open_manifests
from megatron_rdt.train.data.skipped import SkippedSamples, SkippingReader


def open_prepared_data(config: RunConfig, data_ranks: int, data_rank: int = 0, local_rank: int = 0) -> "PreparedData":
    """Verify the corpora of a run, make missing packing plans, and open them; every rank must call this.

    Args:
        config: the run's config.
        data_ranks: number of data-parallel ranks.
        data_rank: number of this rank among them.
        local_rank: number of this process on its node.

    Raises:
        ConfigError: the corpora do not fit together, the model or the number of ranks.
        DataError: a corpus is missing, damaged, too small, or not the same on all ranks.
    """
    manifests = open_manifests(config, local_rank)
    check_tokenizers(list(manifests.values()), config.model)
    check_repeated_shards(manifests, bool(config.eval.every))
    data = PreparedData(config, data_ranks, data_rank, manifests)
    data.validation = _count_validation_targets(data, data_rank, manifests)
    if config.eval.every and config.eval.tasks:
        read = functools.partial(read_groups, manifests.values(), config.eval.examples)
        found = broadcast_object(work_while_others_wait(read if rank_and_world_size()[0] == 0 else None))
        assert found is not None, "rank 0 has read them"
        data.task_groups, data.without_examples = found
    return data


def _count_validation_targets(
    data: "PreparedData", data_rank: int, manifests: Mapping[str, CorpusManifest]
) -> dict[str, ValidationWindows]:
    """Return a rank's validation windows with the counted targets of all ranks; a collective.

    Raises:
        DataError: no target of a corpus counts.
    """
    own = {name: len(windows.rows.counted_targets) for name, windows in data.validation.items()}
    of_shares = dict(gather_objects((data_rank, own)))  # ranks of one data rank have the same windows
    counted = {}
    for name, windows in data.validation.items():
        targets = sum(share[name] for share in of_shares.values())
        check_targets(targets, windows.count, manifests[name], "valid")
        counted[name] = replace(windows, targets=targets)
    return counted


def check_tokenizers(manifests: list[CorpusManifest], model: ModelConfig) -> None:
    """Raise ConfigError if corpora have different tokenizers, or one that does not fit the model."""
    first = manifests[0]
    for other in manifests[1:]:
        if other.document["tokenizer"]["fingerprint"] != first.document["tokenizer"]["fingerprint"]:
            raise ConfigError(
                f"{first.directory} and {other.directory} were made with different tokenizers "
                f"({first.vocab_size:,} and {other.vocab_size:,} pieces). Prepare one with the tokenizer of the other: "
                f"rdt prep --tokenizer {first.directory / 'tokenizer'}."
            )
    check_vocabulary(model, first.vocab_size, f"of {first.directory}")


def check_repeated_shards(manifests: Mapping[str, CorpusManifest], evaluates: bool) -> None:
    """Raise ConfigError if two corpora are the same, or if a validation shard is a training shard of any of them.

    Args:
        manifests: by name of the corpus.
        evaluates: whether the run reads the validation splits.
    """
    corpora: dict[str, str] = {}
    training: dict[str, Path] = {}
    for name, manifest in manifests.items():
        first = corpora.setdefault(manifest.fingerprint, name)
        if first != name:
            raise ConfigError(
                f"{manifests[first].directory} and {manifest.directory} hold the same shards. Give the corpus once, with both "
                "weights added."
            )
        for split, record in manifest.shard_records():
            if split == "train" and record["tokens"]:
                training[record["bin_sha256"]] = manifest.directory / split / record["name"]
    for manifest in manifests.values() if evaluates else ():
        for split, record in manifest.shard_records():
            if split != "train" and record["bin_sha256"] in training:
                raise ConfigError(
                    f"{manifest.directory / split / record['name']}, which is for validation, has the tokens of "
                    f"{training[record['bin_sha256']]}. Prepare it from other text, or set --eval.every 0."
                )


def check_difficulties(manifests: Mapping[str, CorpusManifest]) -> None:
    """Raise DataError for a corpus whose examples have no difficulty, from which T would follow."""
    for manifest in manifests.values():
        if not manifest.tasks:
            raise DataError(
                f"depth.scheme is difficulty, but {manifest.directory} holds no difficulties of examples. Prepare it from the "
                "files of rdt prep tasks, or choose another --depth.scheme."
            )


class PreparedData:
    """`TrainingData` from prepared corpora; the same on every rank but for the validation windows.

    Args:
        config: the run's config.
        data_ranks, data_rank: number of data-parallel ranks, and of this rank among them.
        manifests: verified, by name of the corpus; their packing plans exist.

    Attributes:
        mixture: the training splits and the order of their samples.
        skipped: samples of that order that are left out.
        without_examples: directories of the corpora without examples of tasks, where the run scores them.
    """

    def __init__(
        self, config: RunConfig, data_ranks: int, data_rank: int, manifests: Mapping[str, CorpusManifest]
    ) -> None:
        self.config, self.data_ranks, self.data_rank = config, data_ranks, data_rank
        self.batches = config.train.batches
        self.skipped = SkippedSamples.of_steps(config.data.skip_steps, self.batches)
        self.settings = {corpus.name: corpus for corpus in config.data.corpora()}
        self.tokenizer_directory = next(iter(manifests.values())).directory / "tokenizer"
        corpora = {
            name: self._open_split(manifest, "train", self.settings[name].max_tokens)
            for name, manifest in manifests.items()
        }
        self.begins_with_bos = any(corpus.begins_with_bos for corpus in corpora.values())
        if config.depth.scheme == "difficulty":
            check_difficulties(manifests)
        # Without masks and packing, where documents begin decides nothing, and an index may be made anew.
        uses_documents = config.data.document_mask or config.data.pack != "chunk"
        records = {
            name: CorpusRecord(
                manifest.fingerprint,
                self.settings[name].max_tokens,
                manifest.shard_hashes,
                manifest.index_fingerprint if uses_documents else None,
            )
            for name, manifest in manifests.items()
        }
        weights = integer_weights({name: corpus.weight for name, corpus in self.settings.items()})
        self._from_config = DataHistory([Phase(0, weights)], records)
        self._follow_history(self._from_config, corpora)
        self.validation = {
            name: self._select_validation(manifest) for name, manifest in manifests.items() if config.eval.every
        }
        self.task_groups: list[ExampleGroup] = []
        self.without_examples: list[Path] = []

    def _open_split(self, manifest: CorpusManifest, split: str, max_tokens: int = 0) -> TokenCorpus:
        """Open one split of a corpus, with this corpus's part of the files that may be open at once."""
        return open_corpus(
            manifest,
            split,
            self.config.train.sequence_length,
            self.config.run.seed,
            self.config.data,
            # Validation is never packed, so that losses of runs with different packing can be compared; single examples
            # stay single, and may be longer than those of training.
            pack=split == "train",
            max_tokens=max_tokens,
            max_open=max(1, open_shards_limit() // len(self.settings)),
        )

    def _follow_history(self, history: DataHistory, corpora: dict[str, TokenCorpus]) -> None:
        """Set the order in which samples are taken from `corpora` to that of `history`."""
        self.history = history
        order = MixtureOrder(history.phases)
        # The permutation of a corpus is keyed by its number in the run, which a resume may change.
        for number, name in enumerate(order.names):
            if name in corpora:
                corpora[name].order = corpora[name].order.with_number(number)
        self.mixture = Mixture(order, corpora, self.config.run.seed)

    def _select_validation(self, manifest: CorpusManifest) -> ValidationWindows:
        """Read this rank's validation windows or examples of a corpus, which has an equal part of `eval.sequences`.

        Raises:
            ConfigError: the split, or `eval.sequences`, is too small for one window on each data-parallel rank.
        """
        config, length, corpora = self.config, self.config.train.sequence_length, len(self.settings)
        counts, unit = manifest.document["splits"]["valid"], "tokens"
        needed = (self.data_ranks + 1) * length  # windows leave out the tokens after the last whole one
        if config.data.pack == "example":
            unit, needed = "documents", self.data_ranks
        if counts[unit] < needed:
            row = f"a window of {length}" if unit == "tokens" else "one"
            raise ConfigError(
                f"the validation split of {manifest.directory} has {counts[unit]:,} {unit}, {row} for each of "
                f"{self.data_ranks} data-parallel ranks needs {needed:,}. Prepare it with a larger --valid_fraction, "
                "or set --eval.every 0."
            )
        if config.eval.sequences < self.data_ranks * corpora:
            of_each = f" for each of {corpora} corpora" if corpora > 1 else ""
            raise ConfigError(
                f"eval.sequences is {config.eval.sequences}, fewer than {self.data_ranks} data-parallel ranks{of_each}. "
                "Raise it."
            )
        split = self._open_split(manifest, "valid")
        rows = read_window_share(split, config.eval.sequences // corpora, self.data_rank, self.data_ranks)
        split.close()
        return ValidationWindows(rows, len(rows) * self.data_ranks, len(rows.counted_targets))

    @property
    def shares(self) -> dict[str, float]:
        """Share of each corpus in the samples from the current position on, by name."""
        return {name: self.mixture.order.phases[-1].share(name) for name in self.settings}

    def loader(self, consumed: int, total: int, data_rank: int, device: torch.device) -> BatchLoader:
        """Return the running loader of a data-parallel rank; ConfigError if the run exceeds `max_epochs`."""
        self._check_epochs(total)
        options, closed = self.config.data, threading.Event()
        patience_s = min(options.retry_s, self.config.parallel.timeout_s / 2)  # the others wait in a collective
        patient = PatientReader(self.mixture, patience_s, options.on_unreadable == "skip", closed)
        reader = SkippingReader(patient, self.skipped) if self.skipped.ranges else patient
        return BatchLoader(reader, self.batches, data_rank, self.data_ranks, consumed, total, device, closed)

    def epochs(self, samples: int) -> dict[str, float]:
        """Epochs of each corpus, by name, that the first `samples` samples of the run take; those left out count too."""
        drawn = self.mixture.order.count_per_corpus(self.skipped.count_used(samples))
        return {name: drawn[name] / corpus.samples_per_epoch for name, corpus in self.mixture.corpora.items()}

    def _check_epochs(self, total: int) -> None:
        """Raise ConfigError if a run of `total` samples takes more epochs of a corpus than its `max_epochs`."""
        epochs, drawn = self.epochs(total), self.mixture.order.count_per_corpus(self.skipped.count_used(total))
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
        rows += [
            (n, format_share(self.shares[n]), f"{drawn[n]:,}", f"{epochs[n]:.2f}", f"{limits[n]:g}") for n in epochs
        ]
        advice = "Lower its weight or --train.steps, prepare more text, or raise its max_epochs. The whole run:"
        raise ConfigError("\n  ".join([f"{text}{advice}", *align_columns(rows)]))

    def describe(self, total: int) -> list[str]:
        """Return lines on mixture and packing of a run of `total` samples, and on windows that validation lacks."""
        lines, several = self.skipped.describe(), len(self.settings) > 1
        if several:
            epochs = self.epochs(total)
            parts = [f"{name} {format_share(share)} ({epochs[name]:.3g} epochs)" for name, share in self.shares.items()]
            lines.append(f"data mixture: {', '.join(parts)}")
        for name, corpus in self.mixture.corpora.items():
            if isinstance(corpus, PackedCorpus):
                lines.append(f"{name} " * several + corpus.counts.describe(self.config.train.sequence_length))
        lines += [f"{path} holds no examples of tasks; eval.tasks leaves it out" for path in self.without_examples]
        asked, taken = self.config.eval.sequences, sum(windows.count for windows in self.validation.values())
        if self.validation and taken < asked:
            lines.append(
                f"validation takes {taken:,} windows, fewer than eval.sequences {asked:,}: from each corpus a multiple of the "
                f"{self.data_ranks} data-parallel ranks, and no more than its validation split has"
            )
        return lines

    def progress(self, consumed: int) -> dict[str, Any]:
        """Return samples and epochs by corpus if there are several, and the step of the data's order if steps are skipped."""
        order, used = self.mixture.order, self.skipped.count_used(consumed)
        fields: dict[str, Any] = {}
        if len(order.names) > 1:
            fields |= {"sources": order.count_per_corpus(used), "epochs": self.epochs(consumed)}
        if self.skipped.ranges:
            fields["data_step"] = self.batches.steps_for(used)
        return fields

    def state(self, consumed: int) -> dict[str, Any]:
        """The history of the mixture and the settings that the order depends on, after `consumed` samples."""
        config = self.config
        return self.history.to_state(
            consumed,
            batches=write_batches(self.batches, consumed),
            sequence_length=config.train.sequence_length,
            seed=config.run.seed,
            packing=config.data.pack,
            begins_with_bos=self.begins_with_bos,
            skipped={text: list(samples) for text, samples in self.skipped.passed(consumed).ranges.items()},
        )

    def rank_state(self, consumed: int) -> dict[str, Any] | None:
        """None: the order is computed, so that no rank has a state of its own."""
        return None

    def list_order_steps(self, first: int, last: int) -> list[str]:
        """Return the ranges of steps of the data's order that steps `first` to `last` of the run took."""
        count = self.batches.samples_after
        return self.skipped.list_order_steps(count(first - 1), count(last), self.batches)

    def resume(self, source: Path, state: dict[str, Any], skip_steps: Sequence[str] = ()) -> list[str]:
        """Take over a checkpoint's data order; return lines on changes; CheckpointError if it had other data."""
        config, consumed = self.config, state["consumed_samples"]
        if "stream" in state:
            raise CheckpointError(
                f"{source} was trained on {state['stream']['data.path']}, which was streamed. {suggest_same_data(source)}"
            )
        for key, mine in (("sequence_length", config.train.sequence_length), ("seed", config.run.seed)):
            if state[key] != mine:
                raise CheckpointError(
                    f"{source} was trained with {key} {state[key]}, now it is {mine}: the order of the data would "
                    f"change. {suggest_same_data(source)}"
                )
        if state["packing"] != config.data.pack:
            raise CheckpointError(
                f"{source} was trained with data.pack {state['packing']}, now it is {config.data.pack}: its samples "
                f"would be others. Set --data.pack {state['packing']}, or {suggest_init(source)}."
            )
        paths = {name: settings.path for name, settings in self.settings.items()}
        passed = SkippedSamples({text: (first, end) for text, (first, end) in state.get("skipped", {}).items()})
        self.batches = continue_batches(source, state, config.train)
        wanted = SkippedSamples.of_steps(add_step_ranges(config.data.skip_steps, skip_steps), self.batches)
        self.skipped = passed.continue_with(source, wanted, consumed)
        before, may_add = DataHistory.from_state(state), bool(config.data.mixture)
        used = passed.count_used(consumed)
        # Not `self.history`: a run that rolls back has continued an older one already.
        history, changes = continue_history(source, before, self._from_config, paths, used, may_add)
        self._follow_history(history, self.mixture.corpora)
        return changes
