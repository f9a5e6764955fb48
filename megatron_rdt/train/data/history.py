"""What a checkpoint remembers of its data: where in it the run is, and the phases of its mixture so far."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rdt.data import shard_difference
from megatron_rdt.data.mixture import Phase
from megatron_rdt.errors import CheckpointError

VERSION = 2
# Version 1 knew one corpus, and not what it is called.
UNNAMED = ""
SAME_OR_NEW = "Use the same shards, train.sequence_length and run.seed, or start a new --run.name."
ANOTHER_NAME = " Other data beside it needs another name in data.mixture."


@dataclass(frozen=True)
class CorpusRecord:
    """What tells one corpus from another.

    Attributes:
        fingerprint: of tokenizer, type and shards.
        max_tokens: tokens that are used, the first ones; 0 for all.
        shards: beginning of the SHA-256 of every shard, by name, to say which one changed.
    """

    fingerprint: str
    max_tokens: int
    shards: dict[str, str]


@dataclass(frozen=True)
class DataHistory:
    """The phases of a run's mixture, and what is known of every corpus in them."""

    phases: list[Phase]
    corpora: dict[str, CorpusRecord]

    def state(self, consumed: int, **settings: Any) -> dict[str, Any]:
        """For trainer.json, after `consumed` samples; `settings` are what the order also depends on."""
        return {
            "version": VERSION,
            "consumed_samples": consumed,
            **settings,
            "corpora": {name: asdict(record) for name, record in self.corpora.items()},
            "stages": [{"start": phase.start, "counts": list(phase.counts.items())} for phase in self.phases],
        }

    @staticmethod
    def read(state: dict[str, Any]) -> "DataHistory":
        """That of a checkpoint, of this version or the one before."""
        if state["version"] == 1:
            # Checkpoints of before 0.1.0 may lack the shards.
            record = CorpusRecord(state["data_fingerprint"], 0, state.get("shards", {}))
            return DataHistory([Phase(0, {UNNAMED: 1})], {UNNAMED: record})
        return DataHistory(
            [Phase(phase["start"], dict(phase["counts"])) for phase in state["stages"]],
            {name: CorpusRecord(**record) for name, record in state["corpora"].items()},
        )

    def renamed(self, before: str, now: str) -> "DataHistory":
        """The same with another name for one corpus."""
        names = {name: now if name == before else name for name in self.corpora}
        return DataHistory(
            [Phase(s.start, {names[name]: count for name, count in s.counts.items()}) for s in self.phases],
            {names[name]: record for name, record in self.corpora.items()},
        )


def continued(
    source: Path, before: DataHistory, now: DataHistory, paths: dict[str, str], consumed: int, may_add: bool
) -> tuple[DataHistory, list[str]]:
    """The history of a run that goes on, and what changed, in words.

    A corpus is the one of the checkpoint that has its name, or else its content. Where weights or corpora differ from
    the last phase, a phase begins; those before stay as they are.

    Args:
        source: the checkpoint.
        before: its history.
        now: that of a run that would start with the config of today: one phase.
        paths: of the corpora of today, for messages.
        consumed: samples before.
        may_add: whether a corpus may be new; otherwise each must be one of the checkpoint.

    Raises:
        CheckpointError: a corpus has other content than it had, or is new where none may be.
    """
    for name, record in now.corpora.items():
        if name not in before.corpora:
            twins = [old for old, known in before.corpora.items() if old not in now.corpora and same(known, record)]
            before = before.renamed(twins[0], name) if twins else before
        known = before.corpora.get(name)
        if known is None and not may_add:
            last = list(before.phases[-1].counts)
            known = before.corpora[last[0]]
            if len(last) > 1:
                raise CheckpointError(
                    f"{source} was trained with {' and '.join(last)}, and {paths[name]} is none of them. "
                    "Set --data.mixture, or start a new --run.name."
                )
        if known is not None and not same(known, record):
            raise CheckpointError(
                f"{source} was trained with {_difference(known, record, paths[name])}: the order of the data would "
                f"change. {SAME_OR_NEW}{ANOTHER_NAME if may_add else ''}"
            )
    if UNNAMED in before.corpora:
        raise CheckpointError(
            f"{source} was trained on a corpus that is none of data.mixture (data_fingerprint "
            f"{before.corpora[UNNAMED].fingerprint}). Name it there, or start a new --run.name."
        )
    phase, last_phase = now.phases[0], before.phases[-1]
    if phase.counts == last_phase.counts:  # both in lowest terms
        return DataHistory(before.phases, {**before.corpora, **now.corpora}), []
    kept = [old for old in before.phases if old.start < consumed]
    history = DataHistory([*kept, Phase(consumed, phase.counts)], {**before.corpora, **now.corpora})
    return history, [f"data mixture from sample {consumed:,} on: {_changes(last_phase, phase)}"]


def same(one: CorpusRecord, other: CorpusRecord) -> bool:
    """Whether two records are of the same tokens."""
    return (one.fingerprint, one.max_tokens) == (other.fingerprint, other.max_tokens)


def _difference(known: CorpusRecord, record: CorpusRecord, path: str) -> str:
    if known.fingerprint == record.fingerprint:
        return f"max_tokens {known.max_tokens} of {path}, now it is {record.max_tokens}"
    if not known.shards:
        return f"data_fingerprint {known.fingerprint}, now it is {record.fingerprint}"
    difference = shard_difference(known.shards, record.shards)
    return f"other data than {path} holds now (data_fingerprint): {difference}"


def _changes(before: Phase, now: Phase) -> str:
    names = dict.fromkeys([*before.counts, *now.counts])
    pairs = {name: (shown(before.share(name)), shown(now.share(name))) for name in names}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)


def shown(share: float) -> str:
    """A share with two decimals, or as many more as it needs, up to five."""
    text = f"{share:.5f}".rstrip("0")
    return text + "0" * max(0, 2 - len(text.partition(".")[2]))
