"""Content that is no text although its file's name says so, and messages about bytes that cannot be read."""

import codecs
import re

from data_prep.sources.compression import MAGIC, NotCompressedError

BOM = codecs.BOM_UTF8
# First bytes of files that are not read, by kind. None of them begins a text.
PACKED = {
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\x00",
    "zip": rb"PK\x03\x04",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "lz4": rb"\x04\x22\x4d\x18",
}
# The marks of UTF-32 begin with, or hold, those of UTF-16: they come first.
ENCODINGS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
FEWEST_ZEROS, ZERO_SHARE = 16, 0.1  # zero bytes in a text that are too many: single ones occur


def describe_binary(content: bytes) -> str:
    """Return why the content of a file is no text and what to do, such as `it is UTF-16; convert it ...`; "" for text."""
    for ending, magic in MAGIC.items():
        if content.startswith(magic):
            return f"it is compressed: add {ending} to its name"
    for kind, pattern in PACKED.items():
        if re.match(pattern, content, re.DOTALL):
            return f"it is packed with {kind}, which is not read; unpack it"
    for encoding, marks in ENCODINGS.items():
        if content.startswith(marks):
            return f"it is {encoding}; convert it: iconv -f {encoding} -t UTF-8"
    zeros = content.count(0)
    if zeros >= FEWEST_ZEROS and zeros >= ZERO_SHARE * len(content):
        # The file system has the size of a file, but not its content, if the machine stopped before that was written.
        return (
            f"{zeros:,} of its {len(content):,} bytes are zero, as after a crash or in another encoding than UTF-8; copy it "
            "again or convert it"
        )
    return ""


def invalid_utf8_message(error: UnicodeDecodeError) -> str:
    """Return `: invalid UTF-8 byte 0xff at byte 7`, to be put behind file and line."""
    return f": invalid UTF-8 byte 0x{error.object[error.start]:02x} at byte {error.start}"


def damaged_message(where: str, error: Exception) -> str:
    """Return the message for a damaged compressed file, or one that is not compressed, to be put behind its name."""
    if isinstance(error, NotCompressedError):
        return f": {error}"
    return f": compressed file ends early or is damaged{where} ({error}); copy or download it again"
