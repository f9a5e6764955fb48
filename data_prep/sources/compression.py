"""Compressed text, read so that a file that was cut short is an error and not a shorter text."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

# What reading a file that is cut or damaged raises.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
READ_BYTES = 1 << 17


def decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """The content of a plain, gzip or zstd file, by the ending of `path`; `raw` is the open file.

    Reading raises one of DAMAGED where the compressed content is damaged or ends early. Both formats may hold several
    members or frames, one after another.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdReader(raw), READ_BYTES) if suffix == ".zst" else raw


class _ZstdReader(io.RawIOBase):
    """Zstandard's own stream_reader takes the end of the file for the end of a frame, and stops after the first."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None  # what decodes the frame that has begun
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        """Always: io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of `buffer`; 0 at the end of the file, which must be the end of a frame."""
        while not self._content:
            self._compressed = self._compressed or self._raw.read(READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
