"""Gzip and zstd files read as streams that raise an error at a truncated end, instead of returning less text."""

import codecs
import gzip
import io
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_rdt.errors import DataError
from megatron_rdt.files import escape_invalid_utf8

MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # neither is valid UTF-8
READ_BYTES = 1 << 17
PEEK_BYTES = 64
LARGEST_WINDOW = (
    1 << 31
)  # of zstd: as much as `zstd --long=31` asks for; the library's default refuses more than 128 MiB


class NotCompressedError(Exception):
    """A file with the ending of a compression that holds plain text."""


# Exceptions raised by reading a file that is truncated or damaged.
DAMAGED = (NotCompressedError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def open_decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """Return a stream of the content of an open file: plain, gzip or zstd, by the ending of `path`.

    This, or reading, raises one of DAMAGED if the compressed content is damaged or ends early. Both formats may hold several
    members or frames, one after another.
    """
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst") and not os.fstat(raw.fileno()).st_size:
        raise EOFError("the file is empty")  # to both libraries that is the end of the text; no tool writes it
    if suffix in MAGIC and _begins_as_text(raw):
        raise NotCompressedError(f"it is not compressed; remove {suffix} from its name")
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdReader(raw), READ_BYTES) if suffix == ".zst" else raw


def _begins_as_text(raw: BinaryIO) -> bool:
    """Return True if the first bytes of a file are printable text, as neither compression's are; the position is kept."""
    head = raw.read(PEEK_BYTES)
    raw.seek(-len(head), os.SEEK_CUR)
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


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
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            self._content = memoryview(self._decompress(self._compressed))
            # Bytes after the end of a frame begin the next one.
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        """Return the content of the next bytes of a frame; DataError if there is no memory for its window."""
        try:
            return self._frame.decompress(compressed)
        except (zstandard.ZstdError, MemoryError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            # Not damage: `on_bad` must not skip the file.
            raise DataError(
                f"{escape_invalid_utf8(self._raw.name)}: no memory to decompress it ({error}). A file of `zstd --long=31` "
                "needs 2 GiB per worker: lower --workers."
            ) from error
