"""The 45-byte row that a scan keeps of each document, and .npy files of rows that are written in bounded memory.

Everything that decides a document's fate is in its row: whether it is a duplicate, in which split and in which order it is
written. So billions of documents can be deduplicated, split and shuffled without their text, which is read a second time only
to encode the documents that are kept.
"""

from pathlib import Path
from typing import IO, Any

import numpy as np

SCAN_ROW = np.dtype(
    [
        ("hash", "<u8", 2),  # 128-bit hash of prompt and text: equal documents, and the split
        ("key", "<u8", 2),  # 128-bit order key: the position in the shuffled order, and which of equal documents stays
        ("number", "<u8"),  # of the document in its input
        ("bytes", "<u4"),  # of prompt and text
        ("valid", "u1"),  # whether it is in the validation split
    ]
)
ROWS_HELD = 4096


def bands_path(rows: Path) -> Path:
    """Return the path of the band hashes of the documents in a file of scan rows."""
    return rows.with_suffix(".bands.npy")


class ArrayWriter:
    """Writes a .npy file row by row, holding at most ROWS_HELD rows in memory.

    Args:
        file: open for writing.
        dtype: of the rows.
        width: shape of one row, () for a scalar or a record.
    """

    def __init__(self, file: IO[Any], dtype: np.dtype, width: tuple[int, ...] = ()) -> None:
        self.file, self.dtype, self.width, self.count = file, dtype, width, 0
        self._rows: list[Any] = []
        self._write_header()

    def _write_header(self) -> None:
        """Write a .npy header with the number of rows so far, at the file's position."""
        # NumPy pads the header so that the first axis can grow: the header written at the end has the same length.
        shape = (self.count, *self.width)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, row: Any) -> None:
        """Append a row."""
        self._rows.append(row)
        if len(self._rows) >= ROWS_HELD:
            self._write_held_rows()

    def _write_held_rows(self) -> None:
        """Append the rows in memory to the file, count them, and drop them from memory."""
        self.file.write(np.array(self._rows, self.dtype).tobytes())
        self.count += len(self._rows)
        self._rows = []

    def finish(self) -> None:
        """Write the rows in memory, and the final number of rows into the header."""
        self._write_held_rows()
        end = self.file.tell()
        self.file.seek(0)
        self._write_header()
        self.file.seek(end)
