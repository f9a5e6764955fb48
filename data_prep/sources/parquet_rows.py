"""Rows of Parquet files, one row group after another: a damaged group takes no other with it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS_READ = 256  # at a time


@dataclass(frozen=True)
class RowBatch:
    """Rows that follow one another.

    Attributes:
        first: number of the first row in the file, from 1.
        count: number of rows.
        total: number of rows of all groups that are read.
        keys: names of all columns.
        columns: values of the columns that were asked for and exist, by name; a text that is not UTF-8 is an `InvalidText`.
    """

    first: int
    count: int
    total: int
    keys: list[str]
    columns: dict[str, list[Any]]


@dataclass(frozen=True)
class LostRows:
    """Rows that cannot be read.

    Attributes:
        count: number of rows; None if it is unknown, because the footer of the file is damaged.
        reason: where they are and what is wrong, in words.
    """

    count: int | None
    reason: str


class InvalidText(bytes):
    """The bytes of a text that is not UTF-8."""


@contextmanager
def open_parquet(path: str | Path) -> Iterator[Any]:
    """Yield a pyarrow ParquetFile for the block, which verifies page checksums where the file has them."""
    import pyarrow
    import pyarrow.parquet

    # PyArrow encodes paths as UTF-8, which not every name is; it takes bytes as they are.
    with (
        pyarrow.OSFile(os.fsencode(path)) as file,
        pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def count_group_rows(path: str | Path) -> list[int] | None:
    """Return the number of rows of each row group; None if the footer is damaged."""
    try:
        with open_parquet(path) as parquet:
            return _list_group_rows(parquet)
    except Exception as error:
        describe_damage(error)
        return None


def _list_group_rows(parquet: Any) -> list[int]:
    """Return the number of rows of each row group of an open file; ArrowInvalid if the footer contradicts itself."""
    import pyarrow

    metadata = parquet.metadata
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    # The footer has no checksum: a wrong number of rows would be rows that nobody misses.
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise pyarrow.ArrowInvalid(f"the footer has {metadata.num_rows} rows, its row groups have {sum(rows)}")
    return rows


def describe_damage(error: Exception) -> str:
    """Return the first line of the message of an exception that a damaged file causes; raise any other again."""
    import pyarrow

    is_damage = isinstance(error, pyarrow.ArrowException | UnicodeDecodeError)  # a name of a column may be no UTF-8
    if not is_damage and not (isinstance(error, OSError) and error.errno is None):
        raise error
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def read_row_groups(path: str, start: int, end: int, wanted: Sequence[str]) -> Iterator[RowBatch | LostRows]:
    """Yield the rows from group `start` until before `end` (0: to the last) as RowBatch, damaged ones as LostRows.

    Args:
        path: the file.
        start, end: range of row groups.
        wanted: names of the columns to read, where they exist.
    """
    with ExitStack() as stack:
        try:
            parquet = stack.enter_context(open_parquet(path))
            rows, keys = _list_group_rows(parquet), parquet.schema_arrow.names
        except Exception as error:
            yield LostRows(None, f"not a Parquet file, or damaged: {describe_damage(error)}")
            return
        columns, total = [key for key in wanted if key in keys], sum(rows[start : end or len(rows)])
        if twice := next((key for key in columns if keys.count(key) > 1), ""):
            yield LostRows(total, f'it has {keys.count(twice)} columns called "{twice}"; remove or rename all but one')
            return
        for group in range(start, end or len(rows)):
            before = sum(rows[:group])
            if columns:
                yield from _read_group(parquet, group, before, total, columns)
            else:  # no row has a text, which is said of each
                yield RowBatch(before + 1, rows[group], total, keys, {})


def _read_group(parquet: Any, group: int, before: int, total: int, columns: list[str]) -> Iterator[RowBatch | LostRows]:
    """Yield columns of a row group, after `before` rows of the file, as RowBatch, from damage on as LostRows."""
    count, keys = parquet.metadata.row_group(group).num_rows, parquet.schema_arrow.names
    done, reason = 0, "the footer says that there are more rows than the group has"
    try:
        for batch in parquet.iter_batches(ROWS_READ, [group], columns):
            values = {key: _list_values(batch.column(key)) for key in columns}
            yield RowBatch(before + done + 1, batch.num_rows, total, keys, values)
            done += batch.num_rows
    except Exception as error:
        reason = describe_damage(error)
    if done < count:
        where = f"rows {before + done + 1:,} to {before + count:,}, of row group {group},"
        yield LostRows(count - done, f"{where} are damaged: {reason}")


def _list_values(column: Any) -> list[Any]:
    """Return the values of a column as Python objects; a text that is not UTF-8 becomes an InvalidText."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decode(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> str | InvalidText | None:
    """Decode UTF-8; return None unchanged, and bytes that are not UTF-8 as an InvalidText."""
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return InvalidText(value)
