"""Read the documents of a part, and report or skip the records that cannot be read.

Files are read as bytes and split at "\\n" only: universal newlines and str.splitlines would also split inside a line.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig
from data_prep.sources.compression import DAMAGED, open_decompressed
from data_prep.sources.example_fields import ExampleFields, list_record_fields, take_example_fields
from data_prep.sources.folder_walk import name_unreadable
from data_prep.sources.hugging_face_files import read_dataset_shard, read_spool
from data_prep.sources.inputs import Input, Part
from data_prep.sources.json_lines import find_repeated_key, seek_line_start
from data_prep.sources.not_text import BOM, damaged_message, describe_binary, invalid_utf8_message
from data_prep.sources.parquet_rows import InvalidText, LostRows, read_row_groups
from megatron_rdt.errors import DataError

BAD_LISTED = 20  # bad records that are listed in the manifest
SKIP_BYTES = 1 << 20
JSON_TYPES = {
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
        number: unique in its input: byte offset of its line, number of its row, or 0 for a whole file.
        location: for messages, such as `corpus/a.jsonl:17`.
        text: its text.
        prompt: text before it that does not count for the loss.
        example: task, difficulty and labels, if it is an example of a task.
        name: of its input.
    """

    number: int
    location: str
    text: str
    prompt: str = ""
    example: ExampleFields | None = None
    name: str = ""


@dataclass
class Tally:
    """Counts of what reading a part found.

    Attributes:
        records: records read so far, bad ones included.
        dropped: number of records and documents that were dropped, by reason.
        replaced: number of records in which invalid UTF-8 was replaced.
        bad: the first records that were dropped or repaired: (file, line in the part or 0, rest of the message).
        bad_count: number of all such records.
        lines: lines that begin in the part, of a .jsonl.
        damaged_bytes: size of the part if an unknown number of its records is lost, which counts as one: it is a compressed
            file that is damaged, or a Parquet file without a footer. Of lines with zero bytes, the number of these.
    """

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0
    bad: list[tuple[str, int, str]] = field(default_factory=list)
    bad_count: int = 0
    lines: int = 0
    damaged_bytes: int = 0

    def add_bad(self, path: str, line: int, message: str, records: int = 1) -> None:
        """Count a bad record, or several that one message is about, and keep the message if it is one of the first."""
        self.bad_count += records
        if len(self.bad) < BAD_LISTED:
            self.bad.append((path, line, message))

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the record of the part."""
        return asdict(self) | {"dropped": dict(self.dropped)}


def format_bad_record(path: str, line: int, message: str) -> str:
    """Return `corpus/a.jsonl:17: message`, or without a line number for line 0; `message` begins with its colon."""
    return f"{path}:{line}{message}" if line else f"{path}{message}"


class PartReader:
    """Iterates over the documents of a part.

    Args:
        part: the part to read.
        config: names of the fields, and the policy for bad records.
        spool: file with the documents of a dataset shard, to read instead of the dataset.
        is_wanted: called with the input's name and the document's number; documents for which it returns False are
            skipped without parsing them.
        lines_before: lines of the file before the part, if known; documents then have line numbers.

    Attributes:
        tally: counts of what was read so far.
        position: bytes of input read so far.

    Iterating raises DataError, naming file and line, for a bad record that the policy does not skip.
    """

    def __init__(
        self,
        part: Part,
        config: PrepConfig,
        spool: Path | None = None,
        is_wanted: Callable[[str, int], bool] | None = None,
        lines_before: int | None = None,
    ) -> None:
        self.part, self.config, self.spool = part, config, spool
        self.is_wanted = is_wanted or (lambda name, number: True)
        self.lines_before = lines_before if part.start else 0
        self.tally, self.position = Tally(), 0

    def __iter__(self) -> Iterator[Document]:
        match self.part.kind:
            case "lines":
                yield from self._read_json_lines(self.part.inputs[0])
            case "parquet":
                yield from self._read_parquet(self.part.inputs[0])
            case "hub" if self.spool is not None:
                yield from self._read_spooled(self.part.inputs[0], self.spool)
            case "hub":
                yield from self._read_dataset(self.part.inputs[0])
            case _:
                for file in self.part.inputs:
                    yield from self._read_whole_file(file)

    def _reject(
        self, reason: str, path: str, line: int, message: str, records: int = 1, remedy: str = "Fix the input, or set"
    ) -> None:
        """Count bad records as dropped if the policy is to skip them; otherwise raise DataError with the message.

        Args:
            reason: key in the manifest's `dropped`.
            path: of the file, for messages.
            line: of the record in the part, or 0.
            message: the rest of the message, which begins with its colon.
            records: number of records.
            remedy: the sentence that ends with `--on_bad skip to skip such records`, up to there.
        """
        if self.config.on_bad != "skip":
            text = format_bad_record(path, line and line + self._count_lines_before(), message)
            raise DataError(f"{text}. {remedy} --on_bad skip to skip such records.")
        self.tally.dropped[reason] += records
        self.tally.add_bad(path, line, message, records)

    def _reject_damaged_file(self, file: Input, message: str) -> None:
        """Reject a file that cannot be read to its end: count one record, and the part's size as damaged."""
        self.tally.records += 1
        self.tally.damaged_bytes = self.part.size
        self._reject("damaged", file.shown_path, 0, message)

    def _allow_replacement(self, path: str, line: int, message: str) -> bool:
        """Count the record as repaired and return True if `on_bad` is replace; else reject it and return False."""
        if self.config.on_bad != "replace":
            remedy = "Convert the input to UTF-8, or set --on_bad replace to read U+FFFD instead, or"
            self._reject("bad_utf8", path, line, message, remedy=remedy)
            return False
        self.tally.replaced += 1
        self.tally.add_bad(path, line, message)
        return True

    def _count_lines_before(self) -> int:
        """Return the number of lines before the part. They are counted when a message first needs it."""
        if self.lines_before is None:
            self.lines_before, left = 0, self.part.start
            with open(self.part.inputs[0].path, "rb") as file:
                while left and (chunk := file.read(min(left, SKIP_BYTES))):
                    self.lines_before += chunk.count(b"\n")
                    left -= len(chunk)
            if not chunk.endswith(b"\n"):  # a line that continues into the part belongs to the part before
                self.lines_before += 1
        return self.lines_before

    def _read_whole_file(self, file: Input) -> Iterator[Document]:
        """Yield the content of a text file as one document."""
        if not self.is_wanted(file.name, 0):
            return
        self.tally.records += 1
        path = Path(file.path)
        try:
            with name_unreadable(path), open(path, "rb") as raw:
                content = open_decompressed(raw, path).read()
        except DAMAGED as error:
            self._reject("damaged", file.shown_path, 0, damaged_message("", error))
            return
        self.position += file.bytes
        if problem := describe_binary(content):  # not even with `on_bad: replace` is it text
            self._reject("damaged", file.shown_path, 0, f": {problem}")
            return
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(10, 0, error.start) + 1
            if not self._allow_replacement(file.shown_path, line, invalid_utf8_message(error)):
                return
            text = content.decode("utf-8-sig", "replace")
        yield Document(0, file.shown_path, text, name=file.name)

    def _read_lines(self, file: Input) -> Iterator[tuple[int, bytes]]:
        """Yield (byte offset, line) of the lines of a plain, gzip or zstd file that begin in the part."""
        path, end = Path(file.path), self.part.end
        with name_unreadable(path), open(path, "rb") as raw:
            offset = seek_line_start(raw, self.part.start) if self.part.start else 0
            try:
                stream = open_decompressed(raw, path)
                while not end or offset < end:
                    line = stream.readline()
                    if not line:
                        break
                    self.tally.lines += 1
                    yield offset, line
                    offset += len(line)
                    self.position = raw.tell() - self.part.start
            except DAMAGED as error:
                # Nothing tells how much is missing, or whether what was read before a wrong checksum is right.
                self._reject_damaged_file(file, damaged_message(f" after {self.tally.lines} lines", error))

    def _read_json_lines(self, file: Input) -> Iterator[Document]:
        """Yield the documents of a JSON-lines file that begin in the part."""
        for offset, line in self._read_lines(file):
            if not self.is_wanted(file.name, offset) or not line.removeprefix(BOM).strip():
                continue
            self.tally.records += 1
            number = self.tally.lines
            if b"\0" in line:
                self._reject_zeros(file, number, line)
                continue
            content = self._decode_line(line.rstrip(b"\r\n"), file.shown_path, number, is_first=offset == 0)
            record = None if content is None else self._parse_json(content, file.shown_path, number, offset)
            if record is None:
                continue
            fields = self._take_fields(record.value, file.shown_path, number)
            if fields is not None:
                before = self.lines_before
                location = (
                    f"{file.shown_path} (byte {offset})" if before is None else f"{file.shown_path}:{number + before}"
                )
                yield Document(offset, location, *fields, name=file.name)
        if self.part.end in (0, file.bytes):
            self._count_empty_file()

    def _count_empty_file(self) -> None:
        """Count a part that is a whole file, or its beginning, like an empty text file if no record is in it."""
        if not self.part.start and not self.tally.records:
            self.tally.records += 1
            self.tally.dropped["empty"] += 1

    def _reject_zeros(self, file: Input, number: int, line: bytes) -> None:
        """Reject a line with zero bytes, which JSON cannot have: count one record, and these bytes as damaged."""
        zeros, first = line.count(0), line.index(0)
        self.tally.damaged_bytes += zeros
        problem = describe_binary(line) if number == 1 else ""
        message = f"{zeros:,} zero bytes from byte {first} of the line on, as after a crash; copy it again"
        self._reject("damaged", file.shown_path, number, f": {problem or message}")

    def _decode_line(self, line: bytes, path: str, number: int, is_first: bool) -> str | None:
        """Decode a line of UTF-8, which may begin with a byte order mark, as after `cat`; None if it is rejected."""
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problem = describe_binary(line) if is_first else ""
            hint = f" ({problem})" if problem else ""
            is_allowed = self._allow_replacement(path, number, f"{invalid_utf8_message(error)} of the line{hint}")
            return line.decode("utf-8-sig", "replace") if is_allowed else None

    def _parse_json(self, content: str, path: str, number: int, offset: int) -> "_JsonValue | None":
        """Parse a line of JSON into a _JsonValue; reject it and return None if it cannot be read."""
        try:
            value = json.loads(content)
            wanted = (self.config.text_field, self.config.prompt_field)
            if not (twice := find_repeated_key(content, wanted)):
                return _JsonValue(value)
            message = f"the object has the field {json.dumps(twice)} twice"
        except json.JSONDecodeError as error:
            message = f"not valid JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deeply nested brackets
            message = f"JSON that cannot be read: {str(error).splitlines()[0]}"
        self._reject("bad_json", path, number, f" (byte {offset}): {message}")
        return None

    def _take_fields(self, record: Any, path: str, number: int) -> tuple[str, str, ExampleFields | None] | None:
        """Return text, prompt and any fields of an example of a record; None if it is rejected."""
        values = []
        for key in (self.config.text_field, self.config.prompt_field):
            value = record.get(key) if isinstance(record, dict) else record
            # The prompt is optional: without the option, without the field, or null.
            if key == self.config.prompt_field and (not key or (isinstance(record, dict) and value is None)):
                values.append("")
                continue
            if isinstance(value, InvalidText):
                value = self._replace_invalid_text(value, key, path, number)
                if value is None:
                    return None
            if not isinstance(record, dict) or not isinstance(value, str):
                keys = ", ".join(sorted(record)) if isinstance(record, dict) else "none, it is not an object"
                is_missing = isinstance(record, dict) and key not in record
                found = (
                    "missing" if is_missing else f"{JSON_TYPES.get(type(value), 'no text')} ({type(value).__name__})"
                )
                message = f': field "{key}" is {found}, expected a string; keys present: {keys}'
                self._reject("bad_field", path, number, message)
                return None
            text = self._replace_surrogates(value, path, number)
            if text is None:
                return None
            values.append(text)
        example = take_example_fields(record, self.config) if self.config.task_field else None
        if isinstance(example, str):
            self._reject("bad_field", path, number, example)
            return None
        return values[0], values[1], example

    def _replace_invalid_text(self, text: InvalidText, key: str, path: str, number: int) -> str | None:
        """Return a text of a Parquet file with invalid UTF-8 replaced; None if it is rejected."""
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            is_allowed = self._allow_replacement(path, number, f'{invalid_utf8_message(error)} of field "{key}"')
            return text.decode("utf-8", "replace") if is_allowed else None

    def _replace_surrogates(self, text: str, path: str, number: int) -> str | None:
        """Return a text with lone surrogates, which JSON escapes can spell, replaced; None if it is rejected."""
        try:
            text.encode("utf-8")
            return text
        except UnicodeEncodeError as error:
            code, index = ord(text[error.start]), error.start
        message = f": lone surrogate U+{code:04X} at character {index}, not valid Unicode"
        if not self._allow_replacement(path, number, message):
            return None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _read_parquet(self, file: Input) -> Iterator[Document]:
        """Yield the documents of the part's row groups; rows are numbered from 1 through the whole file."""
        wanted, rows = list_record_fields(self.config), 0
        with name_unreadable(file.path):
            for found in read_row_groups(file.path, self.part.start, self.part.end, wanted):
                if isinstance(found, LostRows):
                    if found.count is None:
                        self._reject_damaged_file(file, f": {found.reason}")
                    else:
                        self.tally.records += found.count
                        self._reject("damaged", file.shown_path, 0, f": {found.reason}", found.count)
                    continue
                for index in range(found.count):
                    row = found.first + index
                    if self.is_wanted(file.name, row):
                        # Columns that are not read stay in the record, since messages list its keys.
                        values = {key: column[index] for key, column in found.columns.items()}
                        yield from self._make_document(dict.fromkeys(found.keys) | values, file, row)
                rows += found.count
                self.position = self.part.size * rows // found.total
        self._count_empty_file()

    def _read_dataset(self, file: Input) -> Iterator[Document]:
        """Yield the documents of a dataset shard, from the hub or a local path."""
        records = read_dataset_shard(file.path, self.config, self.part.start, self.part.end)
        for row, record in enumerate(records, start=1):
            yield from self._make_document(record, file, row)

    def _read_spooled(self, file: Input, spool: Path) -> Iterator[Document]:
        """Yield the documents that the first reading of a dataset shard kept."""
        for row, prompt, text in read_spool(spool):
            if self.is_wanted(file.name, row):
                yield Document(row, f"{file.name}:{row}", text, prompt, name=file.name)

    def _make_document(self, record: Any, file: Input, row: int) -> Iterator[Document]:
        """Yield the document of a row, or nothing if it is rejected."""
        self.tally.records += 1
        path = file.shown_path if self.part.kind == "parquet" else file.name
        fields = self._take_fields(record, path, row)
        if fields is not None:
            yield Document(row, f"{path}:{row}", *fields, name=file.name)


@dataclass(frozen=True)
class _JsonValue:
    """A parsed JSON value; a wrapper, because the value may be None."""

    value: Any
