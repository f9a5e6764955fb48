"""Block hashes of a shard's files, in `<prefix>.sum`: they tell which bytes of a file have changed.

The manifest has one SHA-256 per file, which tells that a file has changed. The hashes of its blocks, beside the file, tell
where. A corpus is complete without them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_rdt.data.shard_files.positioned_reads import prefix_path
from megatron_rdt.data.shard_files.side_files import SIDE_FILES
from megatron_rdt.files import write_text
from megatron_rdt.untrusted_files import read_json

BLOCK_BYTES = 1 << 20
BLOCK_HASH = "xxh3_64"
REQUIRED_SUFFIXES = (".bin", ".idx")
SUFFIXES = (*REQUIRED_SUFFIXES, *(kind.suffix for kind in SIDE_FILES))
SUM_SUFFIX = ".sum"


@dataclass(frozen=True)
class FileHashes:
    """Size and hashes of one file.

    Attributes:
        size: in bytes.
        sha256: of the whole file, hexadecimal.
        blocks: xxh3_64 of each block of BLOCK_BYTES, hexadecimal; the last block may be shorter.
    """

    size: int
    sha256: str
    blocks: list[str]


def hash_file(path: str | os.PathLike[str], inspect: Callable[[int, bytes], None] | None = None) -> FileHashes:
    """Read a file once and hash it whole and block by block.

    Args:
        path: of the file.
        inspect: called with the byte offset and the bytes of each block, to check the content in the same pass.
    """
    digest, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            if inspect is not None:
                inspect(size, block)
            size += len(block)
    return FileHashes(size, digest.hexdigest(), blocks)


def hash_shard(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Hash a finished shard's files, write their block hashes, and return size and SHA-256s for the manifest.

    Returns:
        Fields for the shard's record in the manifest: bin_bytes, bin_sha256, idx_sha256 and the same of each side file.
    """
    paths = {suffix: prefix_path(prefix, suffix) for suffix in SUFFIXES}
    hashes = {
        suffix[1:]: hash_file(path) for suffix, path in paths.items() if suffix in REQUIRED_SUFFIXES or path.is_file()
    }
    write_block_hashes(prefix, hashes)
    return {"bin_bytes": hashes["bin"].size} | {f"{name}_sha256": file.sha256 for name, file in hashes.items()}


def write_block_hashes(prefix: str | os.PathLike[str], hashes: dict[str, FileHashes]) -> None:
    """Write the block hashes of a shard's files, keyed by their endings ("bin"), to its .sum file."""
    files = {name: {"bytes": file.size, "blocks": file.blocks} for name, file in hashes.items()}
    document = {"block_bytes": BLOCK_BYTES, "hash": BLOCK_HASH, "files": files}
    write_text(prefix_path(prefix, SUM_SUFFIX), json.dumps(document) + "\n")


def read_block_hashes(prefix: str | os.PathLike[str]) -> dict[str, tuple[int, list[str]]] | None:
    """Read size and block hashes of a shard's files as they were written, by their endings ("bin"), or None.

    None where there is no readable .sum file: it is only an aid, and the shard may be intact without it.
    """
    try:
        document = read_json(prefix_path(prefix, SUM_SUFFIX))
        if document["block_bytes"] != BLOCK_BYTES or document["hash"] != BLOCK_HASH:
            return None
        files = {name: (int(file["bytes"]), list(file["blocks"])) for name, file in document["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if all(len(blocks) == -(-size // BLOCK_BYTES) for size, blocks in files.values()) else None


def find_changed_ranges(now: FileHashes, size: int, blocks: Sequence[str]) -> list[tuple[int, int]]:
    """Find the byte ranges [first, end) of a file whose block hashes differ from those recorded; neighbours are joined.

    A block that became shorter or longer is not compared: that the size changed is found without hashes.

    Args:
        now: hashes of the file now.
        size: its size when it was written.
        blocks: its block hashes when it was written.
    """
    ranges: list[tuple[int, int]] = []
    for index, (old, new) in enumerate(zip(blocks, now.blocks)):
        first = index * BLOCK_BYTES
        end, old_end = min(first + BLOCK_BYTES, now.size), min(first + BLOCK_BYTES, size)
        if old == new or end != old_end:
            continue
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((first, end))
    return ranges


def list_shard_files(prefix: Path) -> list[Path]:
    """List the files of a shard that exist, including its .sum file."""
    return [path for suffix in (*SUFFIXES, SUM_SUFFIX) if (path := prefix_path(prefix, suffix)).is_file()]
