"""History of a run's data mixture: every phase so far and the identity of every corpus, kept in checkpoints.

A sample's corpus depends on the weights of all phases before it, so a resumed run must know them all.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rdt.data import describe_shard_difference
from megatron_rdt.data.mixture import Phase
from megatron_rdt.errors import CheckpointError, suggest_init

VERSION = 2
ANOTHER_NAME = " To add other data to it, give that another name in data.mixture."


@dataclass(frozen=True)
class CorpusRecord:
    """The identity of a corpus.

    Attributes:
        fingerprint: of tokenizer, token type and shards.
        max_tokens: tokens that are used, the first ones; 0 for all.
        shards: beginning of the SHA-256 of every shard, by name, to say which one changed.
        documents: hash of where documents begin, if samples depend on it; None if not, and in older checkpoints.
    """

    fingerprint: str
    max_tokens: int
    shards: dict[str, str]
    documents: str | None = None

    def has_same_tokens(self, other: "CorpusRecord") -> bool:
        """Return True if both records are of the same tokens."""
        return (self.fingerprint, self.max_tokens) == (other.fingerprint, other.max_tokens)

    def has_other_documents(self, other: "CorpusRecord") -> bool:
        """Return True if samples of both records depend on where documents begin, and the two differ in that."""
        return None not in (self.documents, other.documents) and self.documents != other.documents


@dataclass(frozen=True)
class DataHistory:
    """The phases of a run's mixture, in order, and the record of every corpus in them by name."""

    phases: list[Phase]
    corpora: dict[str, CorpusRecord]

    def to_state(self, consumed: int, **settings: Any) -> dict[str, Any]:
        """Return the entry of trainer.json after `consumed` samples: history, and `settings` of the order."""
        return {
            "version": VERSION,
            "consumed_samples": consumed,
            **settings,
            "corpora": {name: asdict(record) for name, record in self.corpora.items()},
            "stages": [{"start": phase.start, "counts": list(phase.counts.items())} for phase in self.phases],
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> "DataHistory":
        """The history that `to_state` wrote."""
        return DataHistory(
            [Phase(phase["start"], dict(phase["counts"])) for phase in state["stages"]],
            {name: CorpusRecord(**record) for name, record in state["corpora"].items()},
        )

    def rename_corpus(self, before: str, now: str) -> "DataHistory":
        """Return the same history with another name for one corpus."""
        names = {name: now if name == before else name for name in self.corpora}
        return DataHistory(
            [Phase(p.start, {names[name]: count for name, count in p.counts.items()}) for p in self.phases],
            {names[name]: record for name, record in self.corpora.items()},
        )


def continue_history(
    source: Path, before: DataHistory, now: DataHistory, paths: dict[str, str], consumed: int, may_add: bool
) -> tuple[DataHistory, list[str]]:
    """Extend a checkpoint's history by today's mixture; return it with lines that describe what changed.

    A corpus of today is the one of the checkpoint with its name, or else the one with its content. Where weights or
    corpora differ from the last phase, a new phase begins; those before stay as they are.

    Args:
        source: the checkpoint.
        before: its history.
        now: the history of a run that starts with today's config: one phase.
        paths: of today's corpora, for messages.
        consumed: samples before.
        may_add: accept corpora that the checkpoint does not know.

    Raises:
        CheckpointError: a corpus has other content than it had, or is new where none may be.
    """
    for name, record in now.corpora.items():
        if name not in before.corpora:
            # A corpus that was moved or renamed since: known by its content.
            twins = [
                old for old, known in before.corpora.items() if old not in now.corpora and known.has_same_tokens(record)
            ]
            before = before.rename_corpus(twins[0], name) if twins else before
        known = before.corpora.get(name)
        if known is None and not may_add:
            # `data.path` names no corpus, its folder does: so it is compared with the only one of the last phase.
            last = list(before.phases[-1].counts)
            known = before.corpora[last[0]]
            if len(last) > 1:
                raise CheckpointError(
                    f"{source} was trained with {' and '.join(last)}, and {paths[name]} is none of them. "
                    f"Set --data.mixture, or {suggest_init(source)}."
                )
        if known is not None and not known.has_same_tokens(record):
            raise CheckpointError(
                f"{source} was trained with {_describe_difference(known, record, paths[name])}: the order of the data "
                f"would change. {suggest_same_data(source)}{ANOTHER_NAME if may_add else ''}"
            )
        if known is not None and known.has_other_documents(record):
            raise CheckpointError(
                f"{source} was trained with other .idx files than {paths[name]} has now: the tokens are the same, but "
                f"documents begin elsewhere, and data.document_mask or data.pack depends on that. {suggest_same_data(source)}"
            )
    phase, last_phase = now.phases[0], before.phases[-1]
    if phase.counts == last_phase.counts:  # both in lowest terms
        return DataHistory(before.phases, {**before.corpora, **now.corpora}), []
    # A phase that began at this very sample was never used.
    used = [old for old in before.phases if old.start < consumed]
    history = DataHistory([*used, Phase(consumed, phase.counts)], {**before.corpora, **now.corpora})
    changes = _describe_weight_changes(last_phase, phase)
    return history, [f"data mixture from sample {consumed:,} on: {changes}"]


def suggest_same_data(source: Path) -> str:
    """The sentence that ends a refusal to continue from the checkpoint `source` on other data."""
    return f"Use the same shards, train.sequence_length and run.seed, or {suggest_init(source)}."


def _describe_difference(known: CorpusRecord, record: CorpusRecord, path: str) -> str:
    """Describe how a corpus differs from the one that a checkpoint was trained with."""
    if known.fingerprint == record.fingerprint:
        return f"max_tokens {known.max_tokens} of {path}, now it is {record.max_tokens}"
    difference = describe_shard_difference(known.shards, record.shards)
    return f"other data than {path} holds now (data_fingerprint): {difference}"


def _describe_weight_changes(before: Phase, now: Phase) -> str:
    """List the corpora whose share changed, each as `name 0.50 -> 0.25`."""
    names = dict.fromkeys([*before.counts, *now.counts])
    pairs = {name: (format_share(before.share(name)), format_share(now.share(name))) for name in names}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)


def format_share(share: float) -> str:
    """Format a share with two decimals, or as many more as it needs, up to five."""
    text = f"{share:.5f}".rstrip("0")
    return text + "0" * max(0, 2 - len(text.partition(".")[2]))
