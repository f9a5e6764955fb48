"""Print the contents of a corpus as text: windows as training sees them, or whole documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.open_shards import Shards
from megatron_rdt.data.shard_files.side_files import EXAMPLES, LABELS, MASK
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError

RULE = "=" * 8
NOT_COUNTED = ("⟦", "⟧")
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """Options of the printed text.

    Attributes:
        colour: use the terminal's escape sequences.
        ids: print the ids of the tokens below the text.
    """

    colour: bool = False
    ids: bool = False

    def format_heading(self, text: str) -> str:
        """Return a line that is not text of the corpus, in bold with `colour`."""
        return f"{BOLD}{text}{PLAIN}" if self.colour else text

    def mark_uncounted(self, text: str) -> str:
        """Return a text in brackets, dim with `colour`, which mark that it does not count for the loss."""
        marked = text.join(NOT_COUNTED)
        return f"{DIM}{marked}{PLAIN}" if self.colour else marked


def escape_unprintable(text: str) -> str:
    """Return text in which characters that are invisible or move others, except line ends and tabs, are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def describe_corpus(manifest: CorpusManifest) -> Iterator[str]:
    """Yield lines with the tokenizer, the splits and the dropped documents that a manifest records."""
    document = manifest.document
    kind = document["tokenizer"].get("kind", "tokenizer")
    yield f"{manifest.directory}: {kind} of {manifest.vocab_size:,} pieces, tokens as {manifest.dtype.name}"
    for split, content in document["splits"].items():
        line = f"{split}: {content['tokens']:,} tokens, {content['documents']:,} documents, {len(content['shards'])} shards"
        if content["tokens"] and content.get("text_bytes"):
            line += f", {content['text_bytes'] / content['tokens']:.2f} bytes per token"
        yield line
    dropped = {reason: count for reason, count in sorted(document.get("dropped", {}).items()) if count}
    if dropped:
        yield "dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def format_windows(
    directory: str | Path, split: str, samples: range, sequence_length: int, seed: int, style: Style
) -> Iterator[str]:
    """Yield a heading and the texts of each window that a run would read, documents apart, uncounted text marked.

    Args:
        directory: the corpus.
        split: "train" or "valid".
        samples: numbers of the samples in the run's order.
        sequence_length, seed: of the run.
        style: options of the text.

    Raises:
        DataError: the corpus is damaged, or too small for a window.
    """
    from megatron_rdt.data.corpus import TokenCorpus  # imports torch

    corpus = TokenCorpus(directory, split, sequence_length, seed, documents=True, loss_mask=True)
    tokenizer = Tokenizer(corpus.tokenizer_directory)
    starts, batch = corpus.locate(samples), corpus.read_samples(samples)
    corpus.close()
    assert batch.documents is not None
    for row, number in enumerate(samples):
        epoch = number // corpus.samples_per_epoch
        start, end = int(starts[row]), int(starts[row]) + sequence_length
        title = f"sample {number:,} (epoch {epoch}): tokens {start:,} to {end:,} of {split}"
        yield style.format_heading(f"{RULE} {title} {RULE}")
        counts = None if batch.loss_mask is None else batch.loss_mask[row].numpy().copy()
        if counts is not None:
            # The first token is only an input, for which a mask of targets has no value: mark it like the second.
            counts[0] = counts[1]
        documents = batch.documents[row].numpy()
        for document in range(int(documents[-1]) + 1):
            if document:
                yield style.format_heading(f"{RULE[:3]} a document begins {RULE[:3]}")
            inside = documents == document
            tokens = batch.tokens[row].numpy()[inside]
            yield from _format_tokens(tokens, None if counts is None else counts[inside], tokenizer, style)


def format_documents(directory: str | Path, split: str, numbers: Sequence[int], style: Style) -> Iterator[str]:
    """Yield for each document a heading with its length and place, and its text with what is not counted marked.

    Args:
        directory: the corpus.
        split: "train" or "valid".
        numbers: of the documents in the split, from 0.
        style: options of the text.

    Raises:
        ConfigError: there is no document of such a number.
        DataError: the corpus is damaged.
    """
    manifest = load_manifest(directory)
    manifest.verify()
    tokenizer = Tokenizer(manifest.directory / "tokenizer")
    shards, prefixes = Shards(manifest, split), manifest.shard_prefixes(split)
    # Number of the first document of each shard, and of all documents.
    firsts = np.cumsum([0, *(record["documents"] for name, record in manifest.shard_records() if name == split)])
    for number in numbers:
        if not 0 <= number < firsts[-1]:
            found = f"{split} of {directory} has {firsts[-1]:,} documents"
            raise ConfigError(f"--documents {number}: {found}, numbered from 0.")
        index = int(np.searchsorted(firsts, number, side="right")) - 1
        shard, local = shards[index], number - int(firsts[index])
        # A document of another tool may consist of several sequences, or of none.
        first, end = shard.documents[local : local + 2]
        count = int(shard.lengths[first:end].sum())
        start = int(shard.pointers[first]) // shard.dtype.itemsize if count else 0
        title = f"document {number:,}: {count:,} tokens from {start:,} on of {split}/{prefixes[index].name}"
        if shard.has(EXAMPLES):
            example = shard.read_examples(local, 1)[0]
            title += f", {manifest.tasks[example['task']]} of difficulty {example['difficulty']}"
        yield style.format_heading(f"{RULE} {title} {RULE}")
        counts = shard.read_mask(start, count) > 0 if shard.has(MASK) else None
        yield from _format_tokens(shard.read(start, count), counts, tokenizer, style)
        if shard.has(LABELS):
            labels = shard.read_labels(start, count)
            shown = (tokenizer.decode([i]) for i in (labels if counts is None else labels[counts]).tolist())
            yield style.format_heading("targets ") + escape_unprintable(" ".join(shown))
    shards.close()


def _format_tokens(tokens: np.ndarray, counts: np.ndarray | None, tokenizer: Tokenizer, style: Style) -> Iterator[str]:
    """Yield tokens as one text, EOS as `<eos>` and uncounted ones marked; then, with `style.ids`, their ids.

    Args:
        tokens: ids (n,).
        counts: whether each counts for the loss, bool (n,); None if all do.
        tokenizer: decodes them.
        style: options of the text.
    """
    if not len(tokens):
        return
    # Decode runs of equal kind at once: a character may consist of several tokens.
    kinds = np.stack([tokens == tokenizer.eos, np.ones(len(tokens), bool) if counts is None else counts])
    borders = np.flatnonzero(np.any(kinds[:, 1:] != kinds[:, :-1], axis=0)) + 1
    pieces = []
    for run in np.split(np.arange(len(tokens)), borders):
        is_eos, is_counted = kinds[:, run[0]]
        text = "<eos>" * len(run) if is_eos else escape_unprintable(tokenizer.decode(tokens[run].tolist()))
        pieces.append(text if is_counted else style.mark_uncounted(text))
    yield "".join(pieces)
    if style.ids:
        yield style.format_heading("ids ") + " ".join(map(str, tokens.tolist()))
