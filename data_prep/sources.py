"""Documents from files, folders, JSONL, Parquet and Hugging Face datasets.

Files are read as bytes and split at "\\n" only: universal newlines and str.splitlines would also cut inside a line.
"""

import gzip
import json
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from data_prep.config import PrepConfig
from megatron_rdt.errors import ConfigError, DataError

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
BAD_LISTED = 20
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class Document:
    """One document and the place it came from, such as `corpus/a.jsonl:17`."""

    place: str
    text: str


@dataclass
class Progress:
    """Shared by the readers: bytes read so far, what was dropped and why, the first bad records."""

    advance: Callable[[int], None]
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def reject(self, reason: str, message: str, policy: str) -> None:
        """Stop with `message`, or count it, by `policy`."""
        if policy == "error":
            raise DataError(f"{message}. Mend the input, or set --on_bad skip to leave such records out.")
        self.dropped[reason] += 1
        if len(self.bad) < BAD_LISTED:
            self.bad.append(message)


def input_files(config: PrepConfig) -> list[tuple[str, Path]]:
    """(name, path) of every file that the sources name, in a fixed order; names do not depend on the machine."""
    found: list[tuple[str, Path]] = []
    for source in config.sources:
        if source.startswith(HUGGING_FACE):
            continue
        root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
        if not root.exists():
            raise ConfigError(f"source {source} does not exist. Name a file, a folder, hf:NAME or stdlib in --sources.")
        if root.is_file():
            found.append((root.name, root))
            continue
        extensions = (".py",) if source == STDLIB else tuple(config.extensions)
        compressed = tuple(e + c for e in extensions for c in (".gz", ".zst"))
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if source == STDLIB and STDLIB_SKIPPED & set(inside.parts):
                continue
            if path.is_file() and path.name.endswith(extensions + compressed):
                found.append((f"{source if source == STDLIB else root.name}/{inside.as_posix()}", path))
    if not found and not any(source.startswith(HUGGING_FACE) for source in config.sources):
        raise DataError(
            f"no file with an ending of {config.extensions} in {config.sources}. Set --sources or --extensions."
        )
    return found


def documents(config: PrepConfig, progress: Progress) -> Iterator[Document]:
    """Every document of every source, in a fixed order."""
    count = 0
    for document in _all_documents(config, progress):
        if not document.text.strip():
            progress.dropped["empty"] += 1
            continue
        yield document
        count += 1
        if count == config.max_documents:
            return


def _all_documents(config: PrepConfig, progress: Progress) -> Iterator[Document]:
    for name, path in input_files(config):
        if ".jsonl" in path.suffixes:
            yield from _json_lines(name, path, config, progress)
        elif path.suffix == ".parquet":
            yield from _records("parquet", config, progress, data_files=str(path), split="train", name=name)
            progress.advance(path.stat().st_size)
        else:
            content = _read(path, name)
            progress.advance(path.stat().st_size)
            try:
                yield Document(name, content.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                place = f"{name}:{content.count(10, 0, error.start) + 1}"
                progress.reject("bad_utf8", _utf8_message(place, error), config.on_bad)
    for source in config.sources:
        if source.startswith(HUGGING_FACE):
            name = source.removeprefix(HUGGING_FACE)
            yield from _records(name, config, progress, split=config.hf_split, name=name)


def _utf8_message(place: str, error: UnicodeDecodeError) -> str:
    return f"{place}: invalid UTF-8 byte 0x{error.object[error.start]:02x} at byte {error.start}"


def _read(path: Path, name: str) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == ".zst":
            with open(path, "rb") as file:
                return zstandard.ZstdDecompressor().stream_reader(file).read()
    except DAMAGED as error:
        raise _damaged(name, "") from error
    return path.read_bytes()


def _damaged(name: str, where: str) -> DataError:
    return DataError(f"{name}: compressed file ends early or is damaged{where}. Copy or download it again.")


def _lines(path: Path, name: str, progress: Progress) -> Iterator[bytes]:
    """Lines of a plain, gzip or zstd file; progress counts compressed bytes."""
    number = 0
    with open(path, "rb") as raw:
        stream: Any = raw
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            import io

            stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))  # type: ignore[arg-type]
        before = 0
        try:
            for line in stream:
                number += 1
                yield line
                progress.advance(raw.tell() - before)
                before = raw.tell()
        except DAMAGED as error:
            raise _damaged(name, f" after {number} lines") from error


def _json_lines(name: str, path: Path, config: PrepConfig, progress: Progress) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_lines(path, name, progress), start=1):
        place, start = f"{name}:{number}", offset
        offset += len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            progress.reject("bad_utf8", f"{_utf8_message(place, error)} of the line", config.on_bad)
            continue
        except json.JSONDecodeError as error:
            message = f"{place} (byte {start}): not valid JSON: {error.msg} at column {error.colno}"
            progress.reject("bad_json", message, config.on_bad)
            continue
        text = _text(record, place, config, progress)
        if text is not None:
            yield Document(place, text)


def _text(record: Any, place: str, config: PrepConfig, progress: Progress) -> str | None:
    """The text of a record, or None after rejecting it."""
    key = config.text_field
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else "none, it is not an object"
        value = record.get(key) if isinstance(record, dict) else record
        what = "missing" if isinstance(record, dict) and key not in record else f"a {type(value).__name__}"
        message = f'{place}: field "{key}" is {what}, expected a string; keys present: {keys}'
        progress.reject("bad_json", message, config.on_bad)
        return None
    text = record[key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = (
            f"{place}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, not valid Unicode"
        )
        progress.reject("bad_utf8", message, config.on_bad)
        return None
    return text


def _records(kind: str, config: PrepConfig, progress: Progress, name: str, **options: Any) -> Iterator[Document]:
    """Records of a Parquet file or a Hugging Face dataset, streamed."""
    import datasets

    try:
        stream = datasets.load_dataset(kind, streaming=True, **options)
        for number, record in enumerate(stream):
            text = _text(record, f"{name}:{number + 1}", config, progress)
            if text is not None:
                yield Document(f"{name}:{number + 1}", text)
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: could not be read as a dataset: {reason}. Check the name, the split and the network."
        ) from error
