"""What is in a corpus, as text: windows as training sees them, or whole documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.indexed import IndexedDataset
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError

BOUNDARY = "=" * 8
NOT_COUNTED = ("⟦", "⟧")
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """How text is written.

    Attributes:
        colour: use the terminal's escape sequences.
        ids: write the ids of the tokens below the text.
    """

    colour: bool = False
    ids: bool = False

    def heading(self, text: str) -> str:
        """A line that is not text of the corpus."""
        return f"{BOLD}{text}{PLAIN}" if self.colour else text

    def uncounted(self, text: str) -> str:
        """Text that does not count for the loss."""
        marked = text.join(NOT_COUNTED)
        return f"{DIM}{marked}{PLAIN}" if self.colour else marked


def printable(text: str) -> str:
    """Text with everything but line ends and tabs that has no shape of its own, or moves others, as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def describe(manifest: CorpusManifest) -> Iterator[str]:
    """What the manifest says of the corpus."""
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


def windows(
    directory: str | Path, split: str, samples: range, sequence_length: int, seed: int, style: Style
) -> Iterator[str]:
    """Lines of windows as a run takes them.

    Args:
        directory: the corpus.
        split: "train" or "valid".
        samples: numbers of samples, in the order of a run.
        sequence_length, seed: of the run.
        style: how to write.

    Raises:
        DataError: the corpus is damaged, or too small for a window.
    """
    from megatron_rdt.data.corpus import TokenCorpus  # imports torch

    corpus = TokenCorpus(directory, split, sequence_length, seed, documents=True, loss_mask=True)
    tokenizer = Tokenizer(corpus.tokenizer_directory)
    places, read = corpus.locate(samples), corpus.read_samples(samples)
    corpus.close()
    assert read.documents is not None
    for row, number in enumerate(samples):
        epoch = number // corpus.samples_per_epoch
        start, end = int(places[row]), int(places[row]) + sequence_length
        yield style.heading(
            f"{BOUNDARY} sample {number:,} (epoch {epoch}): tokens {start:,} to {end:,} of {split} {BOUNDARY}"
        )
        counts = None if read.loss_mask is None else read.loss_mask[row].numpy().copy()
        if counts is not None:
            counts[0] = counts[1]  # an input only, which no mask of targets speaks of
        documents = read.documents[row].numpy()
        for document in range(int(documents[-1]) + 1):
            if document:
                yield style.heading(f"{BOUNDARY[:3]} a document begins {BOUNDARY[:3]}")
            inside = documents == document
            yield from _text(
                read.tokens[row].numpy()[inside], None if counts is None else counts[inside], tokenizer, style
            )


def documents(directory: str | Path, split: str, numbers: Sequence[int], style: Style) -> Iterator[str]:
    """Lines of whole documents.

    Args:
        directory: the corpus.
        split: "train" or "valid".
        numbers: of the documents in the split, from 0.
        style: how to write.

    Raises:
        ConfigError: there is no document of such a number.
        DataError: the corpus is damaged.
    """
    manifest = load_manifest(directory)
    manifest.verify()
    tokenizer = Tokenizer(manifest.directory / "tokenizer")
    prefixes = manifest.shard_prefixes(split)
    begins = np.cumsum([0, *(record["documents"] for name, record in manifest.shard_records() if name == split)])
    for number in numbers:
        if not 0 <= number < begins[-1]:
            raise ConfigError(
                f"--documents {number}: {split} of {directory} has {begins[-1]:,} documents, numbered from 0."
            )
        place = int(np.searchsorted(begins, number, side="right")) - 1
        shard, local = IndexedDataset(prefixes[place]), number - int(begins[place])
        first, end = shard.documents[local : local + 2]
        count = int(shard.lengths[first:end].sum())
        start = int(shard.pointers[first]) // shard.dtype.itemsize if count else 0
        yield style.heading(
            f"{BOUNDARY} document {number:,}: {count:,} tokens from {start:,} on of {split}/{prefixes[place].name} {BOUNDARY}"
        )
        counts = shard.read_mask(start, count) > 0 if shard.has_mask else None
        yield from _text(shard.read(start, count), counts, tokenizer, style)
        shard.close()


def _text(tokens: np.ndarray, counts: np.ndarray | None, tokenizer: Tokenizer, style: Style) -> Iterator[str]:
    """Tokens as text; what does not count is marked, and EOS is written out."""
    if not len(tokens):
        return
    kinds = np.stack([tokens == tokenizer.eos, np.ones(len(tokens), bool) if counts is None else counts])
    borders = np.flatnonzero(np.any(kinds[:, 1:] != kinds[:, :-1], axis=0)) + 1
    parts = []
    for part in np.split(np.arange(len(tokens)), borders):
        ended, counted = kinds[:, part[0]]
        text = "<eos>" * len(part) if ended else printable(tokenizer.decode(tokens[part].tolist()))
        parts.append(text if counted else style.uncounted(text))
    yield "".join(parts)
    if style.ids:
        yield style.heading("ids ") + " ".join(map(str, tokens.tolist()))
