"""Token shards: the format, the order of samples, batches."""

from megatron_rdt.data.corpus import TokenCorpus, Windows, fixed_windows
from megatron_rdt.data.indexed import IndexedDataset, IndexedWriter
from megatron_rdt.data.loader import Batch, BatchLoader
from megatron_rdt.data.manifest import CorpusManifest, load_manifest, shard_difference
from megatron_rdt.data.packed import PackedCorpus, open_corpus
from megatron_rdt.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "BatchLoader",
    "CorpusManifest",
    "IndexedDataset",
    "IndexedWriter",
    "PackedCorpus",
    "TokenCorpus",
    "Tokenizer",
    "Windows",
    "fixed_windows",
    "load_manifest",
    "open_corpus",
    "shard_difference",
]
