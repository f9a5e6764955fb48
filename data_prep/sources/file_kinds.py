"""Kind of a file: lines of JSON, a Parquet file or plain text, by its ending and, where that does not tell, its content."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from data_prep.config import TEXT_MARK
from data_prep.sources.compression import DAMAGED, open_decompressed
from data_prep.sources.folder_walk import name_unreadable
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import escape_invalid_utf8

COMPRESSED = (".gz", ".zst")
LINES_ENDING = ".jsonl"
JSON_ENDINGS = (".json", ".ndjson", ".jsonlines")  # usually lines of JSON, but also one document
PARQUET_ENDING = ".parquet"
NO_ENDING = "no ending"
LONGEST_FIRST_LINE = 1 << 26
Kind = Literal["lines", "texts", "parquet"]


def list_endings(extensions: Iterable[str]) -> tuple[str, ...]:
    """Return the endings of the files to read, in lower case: the extensions, also with that of a compression behind them."""
    plain = tuple(extension.lower().removesuffix(TEXT_MARK) for extension in extensions)
    return plain + tuple(extension + compressed for extension in plain for compressed in COMPRESSED)


def name_ending(name: str) -> str:
    """Return a file name's ending for a summary, such as `.csv` or `.csv.gz`; NO_ENDING for none or a number."""
    suffixes = Path(name.lower()).suffixes
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    ending = "".join(suffixes[-2:] if is_compressed else suffixes[-1:])
    # Numbers and dates behind a dot are different for every file: no summary could list them.
    return ending if re.fullmatch(r"(\.\w{1,16})+", ending) and not re.search(r"\.\d+$", ending) else NO_ENDING


def find_kind(path: Path, extensions: Iterable[str]) -> Kind:
    """Return "lines" (of JSON), "parquet" or "texts", by the ending or, if that leaves it open, by the content.

    Args:
        path: the file.
        extensions: those of the config, with their marks.

    Raises:
        ConfigError: a file that looks like JSON but is not lines of it, or a compressed Parquet file.
    """
    name, suffixes = path.name.lower(), [suffix.lower() for suffix in path.suffixes]
    marked = [extension for extension in extensions if extension.lower().endswith(TEXT_MARK)]
    if name.endswith(list_endings(marked)):
        return "texts"
    if LINES_ENDING in suffixes:
        return "lines"
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    inner = (suffixes[:-1] if is_compressed else suffixes)[-1:]
    if inner == [PARQUET_ENDING]:
        if is_compressed:
            raise ConfigError(
                f"{escape_invalid_utf8(path)} is a compressed Parquet file. Decompress it: it is read in pieces."
            )
        return "parquet"
    # With `.gz` among the extensions, the name of a compressed file says nothing about what is in it.
    is_unknown = is_compressed and not name.endswith(list_endings(e for e in extensions if e.lower() not in COMPRESSED))
    if is_unknown or (inner and inner[0] in JSON_ENDINGS):
        return _find_kind_by_content(path, suffixes[-1] if is_unknown else inner[0], is_unknown)
    return "texts"


def _find_kind_by_content(path: Path, ending: str, may_be_text: bool) -> Kind:
    """Return "lines" or "texts" by the first line that is not blank; ConfigError if it looks like neither.

    Args:
        path: the file.
        ending: the one that it is read for, for the remedy.
        may_be_text: its ending does not say that it is JSON.

    Raises:
        ConfigError: the file is not lines of JSON, or not even text where `may_be_text`.
    """
    line = _read_first_line(path)
    if line is None:
        return "texts" if may_be_text else "lines"  # empty, or damaged: reading it reports that under `on_bad`
    text = line.decode("utf-8-sig", "replace")
    try:
        if isinstance(json.loads(text), dict):
            return "lines"
    except (ValueError, RecursionError):
        pass
    if may_be_text and not re.match(r'\s*\[?\s*\{\s*"', text):
        return "texts"
    raise ConfigError(
        f"{escape_invalid_utf8(path)} is not lines of JSON: its first line is not a whole object. Write one object per line "
        f"(an array: jq -c '.[]' FILE > FILE.jsonl), or set {ending}{TEXT_MARK} in --extensions to take each such file as "
        "plain text."
    )


def _read_first_line(path: Path) -> bytes | None:
    """Return the first line that is not blank, at most LONGEST_FIRST_LINE of it; None if there is none or it is damaged."""
    try:
        with name_unreadable(path), open(path, "rb") as raw:
            stream = open_decompressed(raw, path)
            while line := stream.readline(LONGEST_FIRST_LINE):
                if line.strip():
                    return line
    except DAMAGED:
        pass
    return None
