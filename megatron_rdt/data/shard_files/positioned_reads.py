"""Reads of ranges of values from open shard files with pread: a file that is cut short is an error, never a killed process."""

import os
from pathlib import Path

import numpy as np

from megatron_rdt.errors import DataError

READ_BYTES = 1 << 30  # Linux reads less than 2 GiB at a time
REBUILD = "Run `rdt prep` again with --restart to rebuild the shards."
RESTORE = (
    "Put the former corpus back and resume from the last checkpoint (--resume auto), or start a new --run.name, from the "
    "weights of this run if you like (--init RUN). Prepare other text into a folder of its own (--out)."
)


def prefix_path(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path `<prefix><suffix>`; unlike with_suffix, it keeps a dot in the prefix."""
    return Path(f"{os.fspath(prefix)}{suffix}")


def read_values(
    descriptor: int, path: Path, dtype: np.dtype, start: int, count: int, unit: str = "token"
) -> np.ndarray:
    """Read `count` values from value `start` of an open file on, shape (count,); DataError if it ends before.

    Args:
        descriptor, path: of the file.
        dtype: of a value.
        start, count: the range.
        unit: name of a value in the message.
    """
    size, offset = count * dtype.itemsize, start * dtype.itemsize
    content = _read_bytes(descriptor, path, offset, size)
    while len(content) < size:
        more = _read_bytes(descriptor, path, offset + len(content), size - len(content))
        if not more:
            raise DataError(
                f"{path} ends at {unit} {start + len(content) // dtype.itemsize} while {unit}s up to {start + count} were "
                f"asked for: it changed while in use. {RESTORE}"
            )
        content += more
    return np.frombuffer(content, dtype)


def _read_bytes(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    """Read up to `size` bytes of an open file from `offset` on; DataError if the disk refuses."""
    try:
        return os.pread(descriptor, min(size, READ_BYTES), offset)
    except OSError as error:  # a bad disk, or a file that another machine deleted while this one had it open (ESTALE)
        raise DataError(
            f"{path} cannot be read from byte {offset:,} on: {error.strerror}. Fix the disk. If the corpus was replaced: "
            f"{RESTORE}"
        ) from error
