"""Megatron's indexed token format, byte for byte: `<prefix>.bin` and `<prefix>.idx`, little endian.

.idx: magic, u64 version 1, u8 dtype code, u64 sequences S, u64 documents + 1, then i32 lengths [S] in tokens,
i64 pointers [S] in bytes, i64 document starts [documents + 1] in sequences. Files open in Megatron-LM, and theirs here.
Reading uses pread: a file that is cut short under a memory map kills the process, a short pread is an error.
"""

import functools
import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UINT16_VOCABULARY = 65500
MAX_SEQUENCE = 2**31 - 1
REBUILD = "Run `rdt prep` again with --restart to rebuild the shards."


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies below 65,500, else int32, as Megatron's writers choose."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY else DTYPES[4]


def prefix_path(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """`<prefix><suffix>`; unlike with_suffix, a dot in the prefix stays."""
    return Path(f"{os.fspath(prefix)}{suffix}")


class IndexedDataset:
    """Reads one pair of files. Opening takes the same time for any number of sequences: arrays are read when asked for.

    Args:
        path: the prefix, without .bin and .idx.

    Attributes:
        dtype: of the tokens.
        tokens: total.

    Raises:
        DataError: a file is missing, is not of this format, or has another size than the index implies.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = prefix_path(path, ".bin"), prefix_path(path, ".idx")
        for file in (self.bin_path, self.idx_path):
            if not file.is_file():
                raise DataError(f"{file} does not exist. {REBUILD}")
        self._read_header()
        expected, actual = self._end_of_last_sequence(), self.bin_path.stat().st_size
        if expected != actual:
            raise DataError(f"{self.bin_path} has {actual} bytes, its index says {expected}. {REBUILD}")
        self.tokens = actual // self.dtype.itemsize
        self._descriptor = os.open(self.bin_path, os.O_RDONLY)

    def _read_header(self) -> None:
        with open(self.idx_path, "rb") as file:
            header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise DataError(f"{self.idx_path} is not an index of Megatron's format. {REBUILD}")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise DataError(
                f"{self.idx_path} has version {version} and dtype code {code}, not readable here. {REBUILD}"
            )
        self.dtype = DTYPES[code]
        expected = HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # one more byte per sequence: multimodal modes
            raise DataError(f"{self.idx_path} has {size} bytes, its header says {expected}. {REBUILD}")
        self._sequences, self._documents = sequences, documents

    def _end_of_last_sequence(self) -> int:
        """Bytes that .bin must have."""
        last = self._sequences - 1
        if last < 0:
            return 0
        length = self._from_index("<i4", 1, 4 * last)
        pointer = self._from_index("<i8", 1, 4 * self._sequences + 8 * last)
        return int(pointer[0]) + int(length[0]) * self.dtype.itemsize

    def _from_index(self, dtype: str, count: int, offset: int) -> np.ndarray:
        """`count` numbers of .idx from the byte `offset` after the header on."""
        values = np.fromfile(self.idx_path, dtype, count, offset=HEADER.size + offset)
        if len(values) != count:
            raise DataError(f"{self.idx_path} ends early: it changed while in use. {REBUILD}")
        return values

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int32 (sequences,)."""
        lengths = self._from_index("<i4", self._sequences, 0)
        if (lengths < 0).any() or lengths.sum(dtype=np.int64) != self.tokens:
            raise DataError(f"{self.idx_path} holds impossible lengths. {REBUILD}")
        return lengths

    @cached_property
    def pointers(self) -> np.ndarray:
        """Byte offset of each sequence, int64 (sequences,)."""
        pointers = self._from_index("<i8", self._sequences, 4 * self._sequences)
        if len(pointers) and pointers[0] != 0:
            raise DataError(f"{self.idx_path} holds impossible pointers. {REBUILD}")
        return pointers

    @cached_property
    def documents(self) -> np.ndarray:
        """First sequence of each document, int64 (documents + 1,); the last entry is the number of sequences."""
        return self._from_index("<i8", self._documents, 12 * self._sequences)

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of sequence `index`, shape (length,), in the file's dtype."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.idx_path}")
        return self.read(int(self.pointers[index]) // self.dtype.itemsize, int(self.lengths[index]))

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token `start` of the file on, across sequences, shape (count,)."""
        size = count * self.dtype.itemsize
        content = os.pread(self._descriptor, size, start * self.dtype.itemsize)
        if len(content) != size:
            raise DataError(
                f"{self.bin_path} ends at token {start + len(content) // self.dtype.itemsize} while tokens up to "
                f"{start + count} were asked for: it changed while in use. {REBUILD}"
            )
        return np.frombuffer(content, self.dtype)

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """First token of each document, int64 (documents,), ascending."""
        starts = np.append(self.pointers // self.dtype.itemsize, self.tokens)
        return starts[self.documents[:-1]]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class IndexedWriter:
    """Writes one pair of files, one sequence per document; both appear under their names when `close` succeeds.

    Args:
        path: the prefix.
        vocab_size: every id must be below it; it also decides the dtype.

    Use as a context manager: an exception inside leaves no file.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.dtype = token_dtype(vocab_size)
        self._lengths: list[int] = []
        self._max_id = 0
        self._context = atomic_open(prefix_path(path, ".bin"), "wb")

    def __enter__(self) -> "IndexedWriter":
        self._file = self._context.__enter__()
        return self

    def add_document(self, tokens: np.ndarray, source: str = "document") -> None:
        """Append a document; DataError for an empty one or an id outside the vocabulary."""
        if len(tokens) == 0 or len(tokens) > MAX_SEQUENCE:
            raise DataError(f"{source} has {len(tokens)} tokens, outside 1 to {MAX_SEQUENCE}. Drop or split it.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            bad = high if high >= self.vocab_size else low
            raise DataError(
                f"{source} has id {bad} but vocab_size is {self.vocab_size}. Use the tokenizer of these shards."
            )
        self._file.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(len(tokens))
        self._max_id = max(self._max_id, high)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(self._lengths)

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    @property
    def max_id(self) -> int:
        """Largest id written so far."""
        return self._max_id

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None and not self._lengths:
            failure = DataError(f"{self.path} would hold no document. Give `rdt prep` more text.")
            self._context.__exit__(DataError, failure, None)
            raise failure
        if kind is None:
            # The index first: a .bin with its name always has its index.
            self._write_index()
        self._context.__exit__(kind, error, trace)  # type: ignore[arg-type]

    def _write_index(self) -> None:
        count = len(self._lengths)
        lengths = np.array(self._lengths, "<i4")
        pointers = np.zeros(count, "<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        with atomic_open(prefix_path(self.path, ".idx"), "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], count, count + 1))
            file.write(lengths.tobytes())
            file.write(pointers.tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
