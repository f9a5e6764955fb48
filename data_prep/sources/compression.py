"""Gzip and zstd files read as streams that raise an error at a truncated end, instead of returning less text."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

# Exceptions raised by reading a file that is truncated or damaged.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
READ_BYTES = 1 << 17


def open_decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """Return a stream of the content of an open file: plain, gzip or zstd, by the ending of `path`.

    Reading raises one of DAMAGED if the compressed content is damaged or ends early. Both formats may hold several
    members or frames, one after another.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdReader(raw), READ_BYTES) if suffix == ".zst" else raw


class _ZstdReader(io.RawIOBase):
    """Stream of all frames of a zstd file.

    Zstandard's own stream_reader stops after the first frame, and takes the end of the file for the end of a frame.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None  # decompressor of the frame that has begun
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True, as io.BufferedReader requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of `buffer`; return its length, 0 at the end of the file.

        Raises:
            EOFError: the file ends inside a frame.
        """
        while not self._content:
            self._compressed = self._compressed or self._raw.read(READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(self._compressed))
            # Bytes after the end of a frame begin the next one.
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
