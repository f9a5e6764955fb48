"""Token shards: the format, the order of samples, batches.

Names are imported on first use: whoever only writes shards does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rdt.data.indexed import IndexedDataset, IndexedWriter
    from megatron_rdt.data.loader import Batch, BatchLoader, TokenCorpus, fixed_documents, fixed_windows
    from megatron_rdt.data.manifest import CorpusManifest, load_manifest, shard_difference
    from megatron_rdt.data.tokenizer import Tokenizer

_MODULES = {
    "Batch": "loader",
    "BatchLoader": "loader",
    "CorpusManifest": "manifest",
    "IndexedDataset": "indexed",
    "IndexedWriter": "indexed",
    "TokenCorpus": "loader",
    "Tokenizer": "tokenizer",
    "fixed_documents": "loader",
    "fixed_windows": "loader",
    "load_manifest": "manifest",
    "shard_difference": "manifest",
}
__all__ = [
    "Batch",
    "BatchLoader",
    "CorpusManifest",
    "IndexedDataset",
    "IndexedWriter",
    "TokenCorpus",
    "Tokenizer",
    "fixed_documents",
    "fixed_windows",
    "load_manifest",
    "shard_difference",
]


def __getattr__(name: str) -> Any:
    """The object `name` of the module that defines it."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
