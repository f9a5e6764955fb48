"""Token shards, tokenizers, the order of samples and batches.

Names are imported on first use, so that whoever only writes shards does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rdt.data.batch import Batch as Batch
    from megatron_rdt.data.corpus import TokenCorpus as TokenCorpus
    from megatron_rdt.data.corpus import read_fixed_windows as read_fixed_windows
    from megatron_rdt.data.example_corpus import ExampleCorpus as ExampleCorpus
    from megatron_rdt.data.loader import BatchLoader as BatchLoader
    from megatron_rdt.data.packed_corpus import PackedCorpus as PackedCorpus
    from megatron_rdt.data.packed_corpus import open_corpus as open_corpus
    from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest as CorpusManifest
    from megatron_rdt.data.shard_files.corpus_manifest import describe_shard_difference as describe_shard_difference
    from megatron_rdt.data.shard_files.corpus_manifest import load_manifest as load_manifest
    from megatron_rdt.data.shard_files.indexed import IndexedDataset as IndexedDataset
    from megatron_rdt.data.shard_files.indexed import IndexedWriter as IndexedWriter
    from megatron_rdt.data.task_examples import ExampleGroup as ExampleGroup
    from megatron_rdt.data.task_examples import read_example_groups as read_example_groups
    from megatron_rdt.data.tokenizer.base import Tokenizer as Tokenizer

_MODULES = {
    "Batch": "batch",
    "BatchLoader": "loader",
    "CorpusManifest": "shard_files.corpus_manifest",
    "ExampleCorpus": "example_corpus",
    "ExampleGroup": "task_examples",
    "IndexedDataset": "shard_files.indexed",
    "IndexedWriter": "shard_files.indexed",
    "PackedCorpus": "packed_corpus",
    "TokenCorpus": "corpus",
    "Tokenizer": "tokenizer.base",
    "load_manifest": "shard_files.corpus_manifest",
    "open_corpus": "packed_corpus",
    "read_example_groups": "task_examples",
    "read_fixed_windows": "corpus",
    "describe_shard_difference": "shard_files.corpus_manifest",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import and return an exported name from the module that defines it; AttributeError for any other."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
