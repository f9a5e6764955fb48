"""Manifests of a run's corpora, for which one rank asks the file system and the others are told.

To check a corpus takes some ten calls of the file system for each shard. Thousands of ranks that check thousands of shards
of a shared file system at once would be a storm that no metadata server survives.
"""

import functools

from megatron_rdt.config import RunConfig
from megatron_rdt.data import CorpusManifest, load_manifest
from megatron_rdt.data.example_corpus import find_longest_document
from megatron_rdt.data.packing_plan import make_plans, read_plan_headers
from megatron_rdt.errors import DataError
from megatron_rdt.object_collectives import (
    broadcast_object,
    raise_on_all_ranks,
    rank_and_world_size,
    work_while_others_wait,
)


def open_manifests(config: RunConfig, local_rank: int) -> dict[str, CorpusManifest]:
    """Return the verified manifests of a run's corpora, by name, with their packing plans made; every rank must call this.

    Rank 0 does it. A rank that finds the very manifest.json that rank 0 has read takes over its answers: the files are
    shared. Where a machine has copies of its own, its local rank 0 does the same there, then its other ranks check sizes.

    Args:
        config: the run's config.
        local_rank: number of this process on its node.

    Raises:
        DataError: a corpus is missing, damaged, or not the same on all ranks; on every rank.
    """
    rank, _ = rank_and_world_size()
    check = functools.partial(_check_corpora, config, config.data.verify, make=True)
    manifests = broadcast_object(work_while_others_wait(check if rank == 0 else None))
    assert manifests is not None, "rank 0 has found them"
    has_copies = not all(manifest.is_own_file() for manifest in manifests.values())
    copies = work_while_others_wait(check if has_copies and local_rank == 0 else None)
    check = functools.partial(_check_corpora, config, "size", make=False)
    copies = work_while_others_wait(check if has_copies and local_rank else None) or copies
    raise_on_all_ranks(_find_difference(rank, copies or {}, manifests))
    return copies or manifests


def _check_corpora(config: RunConfig, level: str, make: bool) -> dict[str, CorpusManifest]:
    """Return the manifests of the corpora, by name, checked against their files, with what readers ask of all shards.

    Args:
        config: the run's config.
        level: "size" or "full", see `CorpusManifest.verify`.
        make: make the packing plans that do not exist.

    Raises:
        DataError: a corpus is missing or damaged.
    """
    manifests, length = {}, config.train.sequence_length
    for corpus in config.data.corpora():
        try:
            manifest = load_manifest(corpus.path)
            manifest.verify(level)
            if config.data.pack == "bestfit":
                if make:
                    make_plans(manifest, "train", length)
                read_plan_headers(manifest, "train", length)
            if config.data.pack == "example":
                for split in ("train", "valid") if config.eval.every else ("train",):
                    find_longest_document(manifest, split)
        except OSError as error:
            raise DataError(
                f"{corpus.path} cannot be read: {error}. Fix the disk, or name another --data.path."
            ) from error
        manifests[corpus.name] = manifest
    return manifests


def _find_difference(
    rank: int, copies: dict[str, CorpusManifest], manifests: dict[str, CorpusManifest]
) -> DataError | None:
    """Return an error if this rank's copies are not of the corpora that rank 0 reads; None if they are."""
    for name, copy in copies.items():
        first = manifests[name]
        if (copy.fingerprint, copy.index_fingerprint) != (first.fingerprint, first.index_fingerprint):
            return DataError(
                f"rank {rank} reads another corpus {copy.directory} than rank 0. Give every node the same files, and start "
                "again."
            )
    return None
