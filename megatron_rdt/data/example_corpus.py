"""ExampleCorpus: a split whose samples are single documents, each in a row of its own (`data.pack: example`)."""

import dataclasses
from typing import Any

import numpy as np
import torch

from megatron_rdt.data.batch import Batch
from megatron_rdt.data.corpus import TokenCorpus
from megatron_rdt.data.sample_order import SampleOrder
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, LongestDocument
from megatron_rdt.data.shard_files.open_shards import Shards
from megatron_rdt.data.shard_files.side_files import EXAMPLES
from megatron_rdt.errors import ConfigError, DataError


class ExampleCorpus(TokenCorpus):
    """Reads documents of one split, one per row, and pads them to `sequence_length` + 1 tokens; padding never counts.

    Every epoch visits each document once, in an order keyed by (seed, epoch). A location is the number of a document in
    the split. Where the documents of a shard start is read when its first one is, and kept in memory, 8 bytes each.
    Arguments as of `TokenCorpus`, without `max_tokens`.

    Args:
        longer_rows: where a document is longer than a row, lengthen all rows to the next multiple of `sequence_length`,
            which every way of splitting sequences over devices divides; otherwise it is an error.

    Raises:
        ConfigError: a document is longer than a row.
        DataError: the corpus is missing or damaged, or has a document without a target.
    """

    def __init__(self, *arguments: Any, longer_rows: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.has_loss_mask = True  # of padding
        self._reads_examples = self._shards.has(EXAMPLES)
        records = self.manifest.document["splits"][self.split]["shards"]
        self._bounds: dict[int, np.ndarray] = {}
        self._first_documents = np.cumsum([0, *(record["documents"] for record in records)])
        self._padding_id = self.manifest.padding_id
        needed = find_longest_document(self.manifest, self.split, self._shards).tokens - 1
        if needed > self.sequence_length and longer_rows:
            self.sequence_length *= -(-needed // self.sequence_length)
        if needed > self.sequence_length:
            raise ConfigError(
                f"data.pack is example, and {self._describe_longest()} of {self.manifest.directory} needs rows of {needed} "
                f"tokens. Set --train.sequence_length to at least {needed}, now {self.sequence_length}."
            )

    def _build_order(self, name: str) -> SampleOrder:
        """Return the order of documents: that of the windows of a stream with L = 1, which are as many."""
        documents = sum(record["documents"] for split, record in self.manifest.shard_records() if split == self.split)
        return SampleOrder(documents + 1, 1, self.seed, f"documents of {self.split}", name)

    def _describe_longest(self) -> str:
        """Describe the longest document, with its difficulty where that is known, for a message."""
        longest = self.manifest.longest_documents[self.split]
        text = f"document {int(self._first_documents[longest.shard]) + longest.document:,} of split {self.split}"
        if not self._reads_examples:
            return text
        example = self._shards[longest.shard].read_examples(longest.document, 1)[0]
        return f"{text}, of task {self.manifest.tasks[example['task']]} with difficulty {example['difficulty']},"

    def locate_evenly(self, count: int) -> np.ndarray:
        """Return the numbers of `count` documents, or of all if fewer, spread evenly, ascending, int64 (n,)."""
        count = min(count, self.samples_per_epoch)
        return np.arange(count, dtype=np.int64) * self.samples_per_epoch // count

    def read(self, locations: np.ndarray) -> Batch:
        """Read the documents of these numbers, one per row, with their difficulties; DataError for an unknown id."""
        return self.read_documents(locations, self.sequence_length + 1)

    def read_documents(self, numbers: np.ndarray, columns: int) -> Batch:
        """Read documents by their numbers into rows of `columns` tokens, at least those of the longest one."""
        shape = len(numbers), columns
        tokens, starts = np.full(shape, self._padding_id, np.int64), np.zeros(shape, np.bool_)
        mask, labels = np.zeros(shape, np.bool_), tokens.copy() if self._reads_labels else None
        padding, difficulties = [], []
        for row, number in enumerate(numbers.tolist()):
            index, document, start, count = self._find_document(number)
            shard = self._shards[index]
            tokens[row, :count] = shard.read(start, count)
            mask[row, :count] = shard.read_mask(start, count) if self._reads_masks else True
            if labels is not None:
                labels[row, :count] = shard.read_labels(start, count)
            if self._reads_examples:
                difficulties.append(int(shard.read_examples(document, 1)["difficulty"][0]))
            starts[row, count : count + 1] = True  # padding is a document of its own
            padding.append(columns - count)
        mask[:, 0] = False  # nothing predicts the first token
        return self._make_batch(
            tokens,
            starts,
            mask,
            labels,
            numbers,
            "document",
            padding=tuple(padding),
            difficulties=tuple(difficulties) if self._reads_examples else None,
        )

    def read_answers(self, numbers: np.ndarray) -> Batch:
        """Read documents with example records into rows as long as the longest; only the targets of the answers count."""
        found = [self._find_document(number) for number in numbers.tolist()]
        batch = self.read_documents(numbers, max(count for *_, count in found))
        answers = [int(self._shards[shard].read_examples(document, 1)["answer"][0]) for shard, document, *_ in found]
        assert batch.loss_mask is not None
        # The answer is the last targets that count: those with at most as many counted ones from them on.
        counted = batch.loss_mask.flip(1).cumsum(1).flip(1)
        return dataclasses.replace(batch, loss_mask=batch.loss_mask & (counted <= torch.tensor(answers)[:, None]))

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the documents of these numbers ahead of `read`."""
        found = (self._find_document(number) for number in locations.tolist())
        self._shards.prefetch([(shard, start, count) for shard, _, start, count in found], self._read_sides)

    def _find_document(self, number: int) -> tuple[int, int, int, int]:
        """Return a document's shard, its number there, its first token there, and its length in tokens."""
        shard = int(np.searchsorted(self._first_documents, number, side="right")) - 1
        document = number - int(self._first_documents[shard])
        if shard not in self._bounds:
            self._bounds[shard] = self._shards.document_bounds(shard)
        start, end = self._bounds[shard][document : document + 2].tolist()
        return shard, document, start, end - start


def find_longest_document(manifest: CorpusManifest, split: str, shards: Shards | None = None) -> LongestDocument:
    """Return the longest document of a split, and note it in the manifest, which answers from then on.

    Args:
        manifest: of the corpus.
        split: "train" or "valid".
        shards: the split's, if they are open already.

    Raises:
        DataError: a document has fewer than two tokens, so that it has no target; or a shard is damaged.
    """
    if split not in manifest.longest_documents:
        shards = shards or Shards(manifest, split)
        longest = LongestDocument(0, 0, 0)
        for shard in range(len(shards)):
            lengths = np.diff(shards.document_bounds(shard))
            if len(lengths) and lengths.min() < 2:
                name = manifest.shard_prefixes(split)[shard].name
                raise DataError(
                    f"document {int(lengths.argmin()):,} of {split}/{name} in {manifest.directory} has "
                    f"{lengths.min()} tokens, so no target. Remove it from the text, or set --data.pack chunk."
                )
            if len(lengths) and lengths.max() > longest.tokens:
                longest = LongestDocument(int(lengths.max()), shard, int(lengths.argmax()))
        manifest.longest_documents[split] = longest
    return manifest.longest_documents[split]
