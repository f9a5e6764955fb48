"""Token shards: the format, the order of samples, batches.

Names are imported on first use: whoever only writes shards does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rdt.data.corpus import TokenCorpus, Windows, fixed_windows
    from megatron_rdt.data.loader import Batch, BatchLoader
    from megatron_rdt.data.packed_corpus import PackedCorpus, open_corpus
    from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, load_manifest, shard_difference
    from megatron_rdt.data.shard_files.indexed import IndexedDataset, IndexedWriter
    from megatron_rdt.data.tokenizer.base import Tokenizer

_MODULES = {
    "Batch": "loader",
    "BatchLoader": "loader",
    "CorpusManifest": "shard_files.corpus_manifest",
    "IndexedDataset": "shard_files.indexed",
    "IndexedWriter": "shard_files.indexed",
    "PackedCorpus": "packed_corpus",
    "TokenCorpus": "corpus",
    "Tokenizer": "tokenizer.base",
    "Windows": "corpus",
    "fixed_windows": "corpus",
    "load_manifest": "shard_files.corpus_manifest",
    "open_corpus": "packed_corpus",
    "shard_difference": "shard_files.corpus_manifest",
}
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


def __getattr__(name: str) -> Any:
    """The object `name` of the module that defines it."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
