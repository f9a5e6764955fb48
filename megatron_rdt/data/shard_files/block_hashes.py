"""Hashes of a shard's blocks, `<prefix>.sum`: where a file differs from what was written, not only that it does.

One SHA-256 per file, in the manifest, says whether a file is as it was written; the hashes of its blocks beside it say which
blocks are not. A corpus is complete without them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_rdt.data.shard_files.indexed import prefix_path
from megatron_rdt.files import write_text

BLOCK_BYTES = 1 << 20
BLOCK_HASH = "xxh3_64"
SUFFIXES = (".bin", ".idx", ".mask")
SUM = ".sum"


@dataclass(frozen=True)
class Content:
    """What a file holds, in hashes.

    Attributes:
        size: in bytes.
        sha256: of the whole, hexadecimal.
        blocks: xxh3_64 of each block of BLOCK_BYTES, the last one shorter, hexadecimal.
    """

    size: int
    sha256: str
    blocks: list[str]


def read_content(path: str | os.PathLike[str], see: Callable[[int, bytes], None] | None = None) -> Content:
    """Read a file once.

    Args:
        path: of the file.
        see: called with the offset and the bytes of each block.
    """
    digest, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            if see is not None:
                see(size, block)
            size += len(block)
    return Content(size, digest.hexdigest(), blocks)


def seal_shard(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Hash the files of a shard that is complete and write the hashes of their blocks beside them.

    Returns:
        The fields of the manifest's record that come of it: bin_bytes, bin_sha256, idx_sha256 and, where there is a mask,
        mask_sha256.
    """
    contents = {
        suffix[1:]: read_content(prefix_path(prefix, suffix))
        for suffix in SUFFIXES
        if suffix != ".mask" or prefix_path(prefix, suffix).is_file()
    }
    write_sums(prefix, contents)
    return {"bin_bytes": contents["bin"].size} | {f"{name}_sha256": c.sha256 for name, c in contents.items()}


def write_sums(prefix: str | os.PathLike[str], contents: dict[str, Content]) -> None:
    """Write the block hashes of a shard's files, by "bin", "idx" and "mask", into its .sum."""
    files = {name: {"bytes": content.size, "blocks": content.blocks} for name, content in contents.items()}
    document = {"block_bytes": BLOCK_BYTES, "hash": BLOCK_HASH, "files": files}
    write_text(prefix_path(prefix, SUM), json.dumps(document) + "\n")


def recorded_blocks(prefix: str | os.PathLike[str]) -> dict[str, tuple[int, list[str]]] | None:
    """Size and block hashes of the shard's files as they were written, by "bin", "idx" and "mask".

    None where there is no readable .sum file: it is an aid, and what it describes may be whole without it.
    """
    try:
        document = json.loads(prefix_path(prefix, SUM).read_text(encoding="utf-8"))
        if document["block_bytes"] != BLOCK_BYTES or document["hash"] != BLOCK_HASH:
            return None
        files = {name: (int(file["bytes"]), list(file["blocks"])) for name, file in document["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if all(len(blocks) == -(-size // BLOCK_BYTES) for size, blocks in files.values()) else None


def differing_ranges(now: Content, size: int, blocks: Sequence[str]) -> list[tuple[int, int]]:
    """Byte ranges [first, end) of a file whose blocks are not those recorded, neighbours together.

    Only bytes that are there now are in a range; a block that a cut went through is compared with nothing.

    Args:
        now: the file as it is.
        size: its size when it was written.
        blocks: the block hashes of then.
    """
    ranges: list[tuple[int, int]] = []
    for index, (old, new) in enumerate(zip(blocks, now.blocks)):
        first = index * BLOCK_BYTES
        end, then = min(first + BLOCK_BYTES, now.size), min(first + BLOCK_BYTES, size)
        if old == new or end != then:
            continue
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((first, end))
    return ranges


def shard_files(prefix: Path) -> list[Path]:
    """The files of a shard that are there, with its .sum."""
    return [path for suffix in (*SUFFIXES, SUM) if (path := prefix_path(prefix, suffix)).is_file()]
