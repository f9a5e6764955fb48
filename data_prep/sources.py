"""Documents from files, folders, JSONL, Parquet and Hugging Face datasets.

Files are read as bytes and split at "\\n" only: universal newlines and str.splitlines would also cut inside a line.
"""

import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.compression import DAMAGED, decompressed
from data_prep.config import PrepConfig
from megatron_rdt.errors import ConfigError, DataError

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
BAD_LISTED = 20


@dataclass(frozen=True)
class Document:
    """One document and the place it came from, such as `corpus/a.jsonl:17`."""

    place: str
    text: str


@dataclass
class Progress:
    """Shared by the readers: bytes read so far, what was dropped and why, the first bad records."""

    advance: Callable[[int], None]
    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0

    def reject(self, reason: str, message: str, policy: str) -> None:
        """Stop with `message`, or count it, by `policy`."""
        if policy != "skip":
            raise DataError(f"{message}. Mend the input, or set --on_bad skip to leave such records out.")
        self.dropped[reason] += 1
        self.note(message)

    def note(self, message: str) -> None:
        """Count a bad record; the first messages go into the manifest."""
        self.bad_count += 1
        if len(self.bad) < BAD_LISTED:
            self.bad.append(message)

    def check_share(self, largest: float) -> None:
        """DataError when more than a share `largest` of the records was bad, and more than a handful."""
        if self.bad_count > max(BAD_LISTED, largest * self.records):
            first = "\n  ".join(self.bad[:3])
            raise DataError(
                f"{self.bad_count:,} of {self.records:,} records are bad, more than --max_bad {largest:g}; the first:\n  "
                f"{first}\nMend the input, or raise --max_bad."
            )


def input_files(config: PrepConfig) -> list[tuple[str, Path]]:
    """(name, path) of every file that the sources name, in a fixed order; names do not depend on the machine.

    A name begins with that of its source; where several sources have the same, their places in the list tell them apart.
    """
    found: list[tuple[str, Path]] = []
    called = Counter(_source_name(source) for source in config.sources if not source.startswith(HUGGING_FACE))
    for index, source in enumerate(config.sources):
        if source.startswith(HUGGING_FACE):
            continue
        root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
        name = _source_name(source)
        name = f"{index}:{name}" if called[name] > 1 else name
        if not root.exists():
            raise ConfigError(f"source {source} does not exist. Name a file, a folder, hf:NAME or stdlib in --sources.")
        extensions = tuple(e.lower() for e in ((".py",) if source == STDLIB else config.extensions))
        endings = extensions + tuple(e + c for e in extensions for c in (".gz", ".zst"))
        if root.is_file():
            if not root.name.lower().endswith(endings):
                raise ConfigError(
                    f"{root} ends with none of {', '.join(extensions)}. Convert it, or name its ending in --extensions "
                    "to take the file as one plain text document."
                )
            found.append((name, root))
            continue
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if source == STDLIB and STDLIB_SKIPPED & set(inside.parts):
                continue
            if path.is_file() and path.name.lower().endswith(endings):
                found.append((f"{name}/{inside.as_posix()}", path))
    if not found and not any(source.startswith(HUGGING_FACE) for source in config.sources):
        raise DataError(
            f"no file with an ending of {config.extensions} in {config.sources}. Set --sources or --extensions."
        )
    return found


def _source_name(source: str) -> str:
    return source if source == STDLIB else Path(source).name


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
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if ".jsonl" in suffixes:
            yield from _json_lines(name, path, config, progress)
        elif suffixes[-1:] == [".parquet"]:
            yield from _parquet(name, path, config, progress)
            progress.advance(path.stat().st_size)
        else:
            yield from _whole_file(name, path, config, progress)
            progress.advance(path.stat().st_size)
    for source in config.sources:
        if source.startswith(HUGGING_FACE):
            yield from _hugging_face(source.removeprefix(HUGGING_FACE), config, progress)


def _whole_file(name: str, path: Path, config: PrepConfig, progress: Progress) -> Iterator[Document]:
    progress.records += 1
    try:
        content = _read(path)
    except DAMAGED:
        progress.reject("damaged", _damaged(path, ""), config.on_bad)
        return
    text = _decoded(content, path, config, progress)
    if text is not None:
        yield Document(name, text)


def _decoded(content: bytes, path: Path, config: PrepConfig, progress: Progress) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = _utf8_message(f"{path}:{content.count(10, 0, error.start) + 1}", error)
        if config.on_bad != "replace":
            progress.reject("bad_utf8", message, config.on_bad)
            return None
        progress.replaced += 1
        progress.note(message)
        return content.decode("utf-8-sig", "replace")


def _utf8_message(place: str, error: UnicodeDecodeError) -> str:
    return f"{place}: invalid UTF-8 byte 0x{error.object[error.start]:02x} at byte {error.start}"


def _read(path: Path) -> bytes:
    with open(path, "rb") as raw:
        return decompressed(raw, path).read()


def _damaged(path: Path, where: str) -> str:
    return f"{path}: compressed file ends early or is damaged{where}; copy or download it again"


def _lines(path: Path, config: PrepConfig, progress: Progress) -> Iterator[bytes]:
    """Lines of a plain, gzip or zstd file; progress counts compressed bytes."""
    number = 0
    with open(path, "rb") as raw:
        before = 0
        try:
            for line in decompressed(raw, path):
                number += 1
                yield line
                progress.advance(raw.tell() - before)
                before = raw.tell()
        except DAMAGED:
            progress.reject("damaged", _damaged(path, f" after {number} lines"), config.on_bad)


def _json_lines(name: str, path: Path, config: PrepConfig, progress: Progress) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_lines(path, config, progress), start=1):
        place, start = f"{path}:{number}", offset
        offset += len(line)
        if not line.strip():
            continue
        progress.records += 1
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            content = line.rstrip(b"\r\n").decode(encoding)
        except UnicodeDecodeError as error:
            message = f"{_utf8_message(place, error)} of the line"
            if config.on_bad != "replace":
                progress.reject("bad_utf8", message, config.on_bad)
                continue
            progress.replaced += 1
            progress.note(message)
            content = line.rstrip(b"\r\n").decode(encoding, "replace")
        try:
            record = json.loads(content)
        except json.JSONDecodeError as error:
            message = f"{place} (byte {start}): not valid JSON: {error.msg} at column {error.colno}"
            progress.reject("bad_json", message, config.on_bad)
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
            message = f"{place} (byte {start}): JSON that cannot be read: {str(error).splitlines()[0]}"
            progress.reject("bad_json", message, config.on_bad)
            continue
        text = _text(record, place, config, progress)
        if text is not None:
            yield Document(f"{name}:{number}", text)


def _text(record: Any, place: str, config: PrepConfig, progress: Progress) -> str | None:
    """The text of a record, or None after rejecting it."""
    key = config.text_field
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else "none, it is not an object"
        value = record.get(key) if isinstance(record, dict) else record
        what = "missing" if isinstance(record, dict) and key not in record else f"a {type(value).__name__}"
        message = f'{place}: field "{key}" is {what}, expected a string; keys present: {keys}'
        progress.reject("bad_field", message, config.on_bad)
        return None
    text = record[key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = (
            f"{place}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, not valid Unicode"
        )
        if config.on_bad != "replace":
            progress.reject("bad_utf8", message, config.on_bad)
            return None
        progress.replaced += 1
        progress.note(message)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parquet(name: str, path: Path, config: PrepConfig, progress: Progress) -> Iterator[Document]:
    try:
        yield from _records("parquet", name, str(path), config, progress, data_files=str(path), split="train")
    except _UnreadableError as error:
        progress.reject("damaged", f"{path}: not a Parquet file, or damaged: {error}", config.on_bad)


def _hugging_face(words: str, config: PrepConfig, progress: Progress) -> Iterator[Document]:
    """Records of a dataset `NAME` or `NAME:CONFIG`, where NAME may be a local folder."""
    name, _, variant = (words, "", "") if Path(words).exists() else words.partition(":")
    options = {"name": variant} if variant else {}
    try:
        yield from _records(name, words, words, config, progress, split=config.hf_split, **options)
    except _UnreadableError as error:
        raise DataError(
            f"hf:{words} could not be read as a dataset: {error}. Check the name (hf:NAME, or hf:NAME:CONFIG where "
            "the dataset has several configurations), --hf_split and the network."
        ) from error


class _UnreadableError(Exception):
    """What the datasets library says, in one line."""


def _records(
    kind: str, name: str, place: str, config: PrepConfig, progress: Progress, **options: Any
) -> Iterator[Document]:
    """Records of what `datasets.load_dataset(kind, **options)` opens, streamed."""
    import datasets

    try:
        stream = iter(datasets.load_dataset(kind, streaming=True, **options))
    except Exception as error:
        raise _UnreadableError(_one_line(error)) from error
    number = 0
    while True:
        try:
            record = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise _UnreadableError(_one_line(error)) from error
        number += 1
        progress.records += 1
        text = _text(record, f"{place}:{number}", config, progress)
        if text is not None:
            yield Document(f"{name}:{number}", text)


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
