"""The documents of a part, and what is said of those that cannot be read.

Files are read as bytes and split at "\\n" only: universal newlines and str.splitlines would also cut inside a line.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig
from data_prep.sources.compression import DAMAGED, decompressed
from data_prep.sources.hugging_face_files import shard_records, spooled
from data_prep.sources.inputs import Input, Part
from megatron_rdt.errors import DataError

BAD_LISTED = 20
SKIP_BYTES = 1 << 20
PARQUET_ROWS = 256


KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        number: unique in its input file: byte of the record, number of the row, or 0.
        place: for messages, such as `corpus/a.jsonl:17`.
        text: what it says.
        prompt: text before it which does not count for the loss.
        name: of its input.
    """

    number: int
    place: str
    text: str
    prompt: str = ""
    name: str = ""


@dataclass
class Tally:
    """What reading a part found, beside its documents.

    Attributes:
        records: read so far.
        dropped: how many were left out, by reason.
        replaced: in how many invalid UTF-8 was replaced.
        bad: the first records that were left out or mended: [file, line in the part or 0, rest of the message].
        bad_count: how many these are in all.
        lines: lines that begin in the part, of a .jsonl.
    """

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0
    bad: list[tuple[str, int, str]] = field(default_factory=list)
    bad_count: int = 0
    lines: int = 0

    def note(self, path: str, line: int, message: str) -> None:
        """Count a bad record; the first messages go into the manifest."""
        self.bad_count += 1
        if len(self.bad) < BAD_LISTED:
            self.bad.append((path, line, message))

    def as_json(self) -> dict[str, Any]:
        """For the record of the part."""
        return asdict(self) | {"dropped": dict(self.dropped)}


def bad_message(path: str, line: int, message: str) -> str:
    """`corpus/a.jsonl:17: what is wrong`; without a line for a file that has none. `message` brings its colon."""
    return f"{path}:{line}{message}" if line else f"{path}{message}"


class Reader:
    """Iterates over the documents of a part.

    Args:
        part: what to read.
        config: fields and policy for bad records.
        spool: what the scan kept of a dataset shard, to read in its place.
        wanted: called with the input's name and the document's number, says which documents to give; the others are not
            even parsed.
        lines_before: lines of the file before the part, where that is known.

    Attributes:
        tally: what was found so far.
        position: bytes of input read so far.

    Iterating raises DataError for a bad record that the policy does not leave out, naming file and line.
    """

    def __init__(
        self,
        part: Part,
        config: PrepConfig,
        spool: Path | None = None,
        wanted: Callable[[str, int], bool] | None = None,
        lines_before: int | None = None,
    ) -> None:
        self.part, self.config, self.spool, self.wanted = part, config, spool, wanted
        self.lines_before = lines_before if part.start else 0
        self.tally, self.position = Tally(), 0

    def __iter__(self) -> Iterator[Document]:
        match self.part.kind:
            case "lines":
                yield from self._json_lines(self.part.inputs[0])
            case "parquet":
                yield from self._parquet(self.part.inputs[0])
            case "hub" if self.spool is not None:
                yield from self._spooled(self.part.inputs[0], self.spool)
            case "hub":
                yield from self._hub(self.part.inputs[0])
            case _:
                for file in self.part.inputs:
                    yield from self._whole_file(file)

    def _is_wanted(self, name: str, number: int) -> bool:
        return self.wanted is None or self.wanted(name, number)

    def _reject(self, reason: str, path: str, line: int, message: str) -> None:
        """Stop with the message, or count it, by the policy."""
        if self.config.on_bad != "skip":
            text = bad_message(path, line and line + self._lines_before(), message)
            raise DataError(f"{text}. Mend the input, or set --on_bad skip to leave such records out.")
        self.tally.dropped[reason] += 1
        self.tally.note(path, line, message)

    def _lines_before(self) -> int:
        """Lines before the part. Counted only when a message needs them."""
        if self.lines_before is None:
            self.lines_before, left = 0, self.part.start
            with open(self.part.inputs[0].path, "rb") as file:
                while left and (chunk := file.read(min(left, SKIP_BYTES))):
                    self.lines_before += chunk.count(b"\n")
                    left -= len(chunk)
            if not chunk.endswith(b"\n"):  # the line that goes on into the part belongs to the one before
                self.lines_before += 1
        return self.lines_before

    def _whole_file(self, file: Input) -> Iterator[Document]:
        if not self._is_wanted(file.name, 0):
            return
        self.tally.records += 1
        path = Path(file.path)
        try:
            with open(path, "rb") as raw:
                content = decompressed(raw, path).read()
        except DAMAGED:
            self._reject("damaged", file.path, 0, _damaged(""))
            return
        self.position += file.bytes
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(10, 0, error.start) + 1
            if self.config.on_bad != "replace":
                self._reject("bad_utf8", file.path, line, _utf8_message(error))
                return
            self.tally.replaced += 1
            self.tally.note(file.path, line, _utf8_message(error))
            text = content.decode("utf-8-sig", "replace")
        yield Document(0, file.path, text, name=file.name)

    def _lines(self, file: Input) -> Iterator[tuple[int, bytes]]:
        """(byte at which it begins, line) of the lines of a plain, gzip or zstd file that begin in the part."""
        path, end = Path(file.path), self.part.end
        with open(path, "rb") as raw:
            offset = _skip_line(raw, self.part.start) if self.part.start else 0
            try:
                stream = decompressed(raw, path)
                while not end or offset < end:
                    line = stream.readline()
                    if not line:
                        break
                    self.tally.lines += 1
                    yield offset, line
                    offset += len(line)
                    self.position = raw.tell() - self.part.start
            except DAMAGED:
                self._reject("damaged", file.path, 0, _damaged(f" after {self.tally.lines} lines"))

    def _json_lines(self, file: Input) -> Iterator[Document]:
        for offset, line in self._lines(file):
            if not self._is_wanted(file.name, offset) or not line.strip():
                continue
            self.tally.records += 1
            number = self.tally.lines
            content = self._decoded(line.rstrip(b"\r\n"), file.path, number, first=offset == 0)
            record = None if content is None else self._parsed(content, file.path, number, offset)
            if record is None:
                continue
            fields = self._fields(record.value, file.path, number)
            if fields is not None:
                known = self.lines_before is not None
                place = f"{file.path}:{number + self._lines_before()}" if known else f"{file.path} (byte {offset})"
                yield Document(offset, place, *fields, name=file.name)

    def _decoded(self, line: bytes, path: str, number: int, first: bool) -> str | None:
        encoding = "utf-8-sig" if first else "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            message = f"{_utf8_message(error)} of the line"
            if self.config.on_bad != "replace":
                self._reject("bad_utf8", path, number, message)
                return None
            self.tally.replaced += 1
            self.tally.note(path, number, message)
            return line.decode(encoding, "replace")

    def _parsed(self, content: str, path: str, number: int, offset: int) -> "_Parsed | None":
        try:
            return _Parsed(json.loads(content))
        except json.JSONDecodeError as error:
            message = f"not valid JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
            message = f"JSON that cannot be read: {str(error).splitlines()[0]}"
        self._reject("bad_json", path, number, f" (byte {offset}): {message}")
        return None

    def _fields(self, record: Any, path: str, number: int) -> tuple[str, str] | None:
        """Text and prompt of a record, or None after rejecting it."""
        values = []
        for key in (self.config.text_field, self.config.prompt_field):
            value = record.get(key) if isinstance(record, dict) else record
            if key == self.config.prompt_field and (not key or (isinstance(record, dict) and value is None)):
                values.append("")
                continue
            if not isinstance(record, dict) or not isinstance(value, str):
                keys = ", ".join(sorted(record)) if isinstance(record, dict) else "none, it is not an object"
                missing = isinstance(record, dict) and key not in record
                what = "missing" if missing else f"{KINDS.get(type(value), 'no text')} ({type(value).__name__})"
                message = f': field "{key}" is {what}, expected a string; keys present: {keys}'
                self._reject("bad_field", path, number, message)
                return None
            mended = self._without_surrogates(value, path, number)
            if mended is None:
                return None
            values.append(mended)
        return values[0], values[1]

    def _without_surrogates(self, text: str, path: str, number: int) -> str | None:
        try:
            text.encode("utf-8")
            return text
        except UnicodeEncodeError as error:
            code, place = ord(text[error.start]), error.start
        message = f": lone surrogate U+{code:04X} at character {place}, not valid Unicode"
        if self.config.on_bad != "replace":
            self._reject("bad_utf8", path, number, message)
            return None
        self.tally.replaced += 1
        self.tally.note(path, number, message)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _parquet(self, file: Input) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file.path) as parquet:
                groups = range(self.part.start, self.part.end or parquet.metadata.num_row_groups)
                row = sum(parquet.metadata.row_group(i).num_rows for i in range(groups.start))
                keys = parquet.schema_arrow.names
                named = [key for key in (self.config.text_field, self.config.prompt_field) if key in keys]
                first, rows = row, sum(parquet.metadata.row_group(i).num_rows for i in groups)
                for batch in parquet.iter_batches(PARQUET_ROWS, groups, named) if named else ():
                    columns = {key: batch.column(key).to_pylist() for key in named}
                    for index in range(batch.num_rows):
                        row += 1
                        if self._is_wanted(file.name, row):
                            record = dict.fromkeys(keys) | {key: columns[key][index] for key in named}
                            yield from self._record(record, file, row)
                    self.position = self.part.size * (row - first) // rows
                for missing in range(row + 1, first + rows + 1):  # none of the columns is there
                    yield from self._record(dict.fromkeys(keys), file, missing)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            text = str(error).strip().splitlines()
            reason = text[0].rstrip(".") if text else type(error).__name__
            self._reject("damaged", file.path, 0, f": not a Parquet file, or damaged: {reason}")

    def _hub(self, file: Input) -> Iterator[Document]:
        for row, record in enumerate(shard_records(file.path, self.config, self.part.start, self.part.end), start=1):
            yield from self._record(record, file, row)

    def _spooled(self, file: Input, spool: Path) -> Iterator[Document]:
        for row, prompt, text in spooled(spool):
            if self._is_wanted(file.name, row):
                yield Document(row, f"{file.name}:{row}", text, prompt, file.name)

    def _record(self, record: Any, file: Input, row: int) -> Iterator[Document]:
        self.tally.records += 1
        path = file.path if self.part.kind == "parquet" else file.name
        fields = self._fields(record, path, row)
        if fields is not None:
            yield Document(row, f"{path}:{row}", *fields, name=file.name)


@dataclass(frozen=True)
class _Parsed:
    """A value of JSON, which may be null."""

    value: Any


def _skip_line(raw: Any, start: int) -> int:
    """Go to the first line that begins at byte `start` or later; its byte."""
    raw.seek(start - 1)
    while (piece := raw.readline(SKIP_BYTES)) and not piece.endswith(b"\n"):
        pass
    return raw.tell()


def _utf8_message(error: UnicodeDecodeError) -> str:
    return f": invalid UTF-8 byte 0x{error.object[error.start]:02x} at byte {error.start}"


def _damaged(where: str) -> str:
    return f": compressed file ends early or is damaged{where}; copy or download it again"
