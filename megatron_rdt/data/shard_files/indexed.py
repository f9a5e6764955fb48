"""Megatron's indexed token format, byte for byte: `<prefix>.bin` and `<prefix>.idx`, little endian.

.idx: magic, u64 version 1, u8 dtype code, u64 sequences S, u64 documents + 1, then i32 lengths [S] in tokens,
i64 pointers [S] in bytes, i64 document starts [documents + 1] in sequences. Files open in Megatron-LM, and theirs here.
Reading uses pread: a file that is cut short under a memory map kills the process, a short pread is an error.

Optional files beside them, which Megatron does not know, are described in `megatron_rdt.data.shard_files.side_files`.
"""

import contextlib
import os
import struct
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_rdt.data.shard_files.file_identity import identify_file
from megatron_rdt.data.shard_files.positioned_reads import REBUILD, RESTORE, prefix_path, read_values
from megatron_rdt.data.shard_files.side_files import (
    EXAMPLES,
    LABELS,
    MASK,
    SIDE_FILES,
    SideFile,
    SideWriter,
    check_document_values,
    missing_side_file,
)
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


class FileReplacedError(DataError):
    """Raised when a file that is read in parts was replaced after the first part."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that Megatron's writers choose: uint16 for vocabularies below 65,500, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY else DTYPES[4]


class IndexedDataset:
    """Reads the tokens of one shard, and its index; opening reads the index's header only, whatever its size.

    Args:
        path: the prefix, without .bin and .idx.

    Attributes:
        dtype: of the tokens.
        tokens: number of tokens.
        document_count: number of documents, empty ones included.
        side_paths: paths of the side files that exist, by their kind.
        identities: of the files that were opened: .idx, .bin, then the side files.

    Raises:
        DataError: a file is missing, is not of this format, or has another size than the index implies.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.prefix, self.bin_path, self.idx_path = path, prefix_path(path, ".bin"), prefix_path(path, ".idx")
        self.side_paths = {kind: file for kind in SIDE_FILES if (file := prefix_path(path, kind.suffix)).is_file()}
        for file in (self.bin_path, self.idx_path):
            if not file.is_file():
                raise DataError(f"{file} does not exist. {REBUILD}")
        with open(self.idx_path, "rb") as index:
            self.identities = [identify_file(index.fileno())]
            self._read_header(index)
            expected = self._read_end_of_last_sequence(index)
        self._descriptors: list[int] = []
        self._descriptor = self._open(self.bin_path)
        self._side_descriptors: dict[SideFile, int] = {}
        try:
            self._check_sizes(expected)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> int:
        """Open a file for reading and add its identity; return the descriptor."""
        descriptor = os.open(path, os.O_RDONLY)
        self._descriptors.append(descriptor)
        self.identities.append(identify_file(descriptor))
        return descriptor

    def _check_sizes(self, expected: int) -> None:
        """Set `tokens`, and open the side files.

        Args:
            expected: bytes of .bin by the index.

        Raises:
            DataError: .bin has another size, or a side file has not one value for each token or document.
        """
        actual = self.identities[1].size
        if expected != actual:
            raise DataError(f"{self.bin_path} has {actual} bytes, its index says {expected}. {REBUILD}")
        self.tokens = actual // self.dtype.itemsize
        for kind, path in self.side_paths.items():
            self._side_descriptors[kind] = self._open(path)
            size = self.identities[-1].size
            if due := kind.describe_size_fault(size, self.dtype, self.tokens, self.document_count):
                raise DataError(f"{path} has {size} bytes, {due}. {REBUILD}")

    def _read_header(self, file: IO[bytes]) -> None:
        """Set the counts and the dtype from the header of .idx; DataError for another format or file size."""
        header, size = file.read(HEADER.size), self.identities[0].size
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise DataError(f"{self.idx_path} is not an index of Megatron's format. {REBUILD}")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            found = f"version {version} and dtype code {code}"
            raise DataError(f"{self.idx_path} has {found}, not readable here. {REBUILD}")
        self.dtype = DTYPES[code]
        expected = HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # one more byte per sequence: multimodal modes
            raise DataError(f"{self.idx_path} has {size} bytes, its header says {expected}. {REBUILD}")
        self._sequences, self._documents, self._modes = sequences, documents, size > expected
        self.document_count = max(0, documents - 1)

    def _read_end_of_last_sequence(self, file: IO[bytes]) -> int:
        """Read from the index the size that .bin must have, in bytes."""
        # Only the last length and pointer: the arrays are checked when they are first used.
        last = self._sequences - 1
        if last < 0:
            return 0
        length = self._read_numbers(file, "<i4", 1, 4 * last)
        pointer = self._read_numbers(file, "<i8", 1, 4 * self._sequences + 8 * last)
        return int(pointer[0]) + int(length[0]) * self.dtype.itemsize

    @contextlib.contextmanager
    def open_index(self) -> Iterator[IO[bytes]]:
        """Open .idx again for the block; FileReplacedError if it is not the file whose header was read."""
        with open(self.idx_path, "rb") as file:
            if not identify_file(file.fileno()).is_same_file(self.identities[0]):
                raise FileReplacedError(f"{self.idx_path} was replaced while in use. {RESTORE}")
            yield file

    def _read_index(self, dtype: str, count: int, offset: int) -> np.ndarray:
        """Open .idx and read `count` numbers, starting `offset` bytes after the header."""
        with self.open_index() as file:
            return self._read_numbers(file, dtype, count, offset)

    def _read_numbers(self, file: IO[bytes], dtype: str, count: int, offset: int) -> np.ndarray:
        """Read `count` numbers of .idx, starting `offset` bytes after the header."""
        file.seek(0)
        values = np.fromfile(file, dtype, count, offset=HEADER.size + offset)
        if len(values) != count:
            raise DataError(f"{self.idx_path} ends early: it changed while in use. {RESTORE}")
        return values

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int32 (sequences,); read and checked at first access, DataError if impossible."""
        lengths = self._read_index("<i4", self._sequences, 0)
        if (lengths < 0).any() or lengths.sum(dtype=np.int64) != self.tokens:
            raise DataError(f"{self.idx_path} holds impossible lengths. {REBUILD}")
        return lengths

    @cached_property
    def pointers(self) -> np.ndarray:
        """Byte offset in .bin of each sequence, int64 (sequences,); read and checked like `lengths`."""
        pointers = self._read_index("<i8", self._sequences, 4 * self._sequences)
        if not np.array_equal(pointers, compute_byte_pointers(self.lengths, self.dtype)):
            raise DataError(f"{self.idx_path} holds impossible pointers. {REBUILD}")
        return pointers

    @cached_property
    def documents(self) -> np.ndarray:
        """First sequence of each document, int64 (documents + 1,); the last entry is the number of sequences.

        An empty document has the same entry as the next one.
        """
        documents = self._read_index("<i8", self._documents, 12 * self._sequences)
        ends = len(documents) and documents[0] == 0 and documents[-1] == self._sequences
        if not ends or (np.diff(documents) < 0).any():
            raise DataError(f"{self.idx_path} holds impossible documents. {REBUILD}")
        return documents

    @cached_property
    def modes(self) -> np.ndarray | None:
        """Modality of each sequence, int8 (sequences,); None in files that hold text only."""
        offset = 12 * self._sequences + 8 * self._documents
        return self._read_index("i1", self._sequences, offset) if self._modes else None

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self._sequences

    def __getitem__(self, index: int) -> np.ndarray:
        """Read the tokens of sequence `index`, shape (length,), in the file's dtype."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.idx_path}")
        return self.read(int(self.pointers[index]) // self.dtype.itemsize, int(self.lengths[index]))

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` tokens from token `start` of the file on, across sequences, shape (count,)."""
        return read_values(self._descriptor, self.bin_path, self.dtype, start, count)

    def prefetch(self, start: int, count: int, sides: Collection[SideFile] = ()) -> None:
        """Ask the kernel to read these tokens, and their values in side files, ahead: many requests at once are faster."""
        if not count or not hasattr(os, "posix_fadvise"):  # the system call takes 0 for everything; macOS has none
            return
        files = [(self._descriptor, self.dtype)]
        files += [(self._side_descriptors[kind], kind.value_dtype(self.dtype)) for kind in sides if self.has(kind)]
        with contextlib.suppress(OSError):  # some file systems take no advice
            for descriptor, dtype in files:
                size = dtype.itemsize
                os.posix_fadvise(descriptor, start * size, count * size, os.POSIX_FADV_WILLNEED)

    def has(self, kind: SideFile) -> bool:
        """Return True if there is a side file of this kind."""
        return kind in self._side_descriptors

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """Read the loss mask of `count` tokens from token `start` on: 1 for a token that counts as a target, uint8 (count,).

        Raises:
            DataError: there is no .mask file, it ends early, or holds another value.
        """
        mask = self._read_side(MASK, start, count)
        if count and mask.max() > 1:
            offset, path = start + int(np.argmax(mask > 1)), self.side_paths[MASK]
            raise DataError(f"{path} holds {mask.max()} at byte {offset}, neither 0 nor 1. {REBUILD}")
        return mask

    def read_labels(self, start: int, count: int) -> np.ndarray:
        """Read the ids that are targets in the columns of `count` tokens from token `start` on, shape (count,)."""
        return self._read_side(LABELS, start, count)

    def read_examples(self, start: int, count: int) -> np.ndarray:
        """Read the example records of `count` documents from document `start` on, EXAMPLE (count,)."""
        return self._read_side(EXAMPLES, start, count)

    def _read_side(self, kind: SideFile, start: int, count: int) -> np.ndarray:
        """Read `count` values of a side file, starting at value `start`; DataError if there is none or it ends early."""
        if not self.has(kind):
            raise missing_side_file(prefix_path(self.prefix, kind.suffix))
        unit = "document" if kind.per_document else "token"
        path = self.side_paths[kind]
        return read_values(self._side_descriptors[kind], path, kind.value_dtype(self.dtype), start, count, unit)

    @cached_property
    def document_bounds(self) -> np.ndarray:
        """First token of each document, empty ones included, then the number of tokens, int64 (documents + 1,)."""
        return np.append(self.pointers // self.dtype.itemsize, self.tokens)[self.documents]

    @cached_property
    def document_starts(self) -> np.ndarray:
        """First token of each document that is not empty, int64 (documents,), ascending."""
        bounds = self.document_bounds
        return bounds[:-1][np.diff(bounds) > 0]

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def compute_byte_pointers(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Compute the byte offset of each sequence in .bin, int64 (sequences,), from the lengths in tokens."""
    pointers = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    return pointers


class IndexedWriter:
    """Writes one shard, one sequence per document, with side files if the documents have values for them.

    The files get their names when the `with` block ends without an exception, .bin last; otherwise none is left.

    Args:
        path: the prefix.
        vocab_size: every id must be below it; it also decides the dtype.

    Attributes:
        tokens, documents: numbers written so far.
        max_id: largest id written so far.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.tokens = self.max_id = 0
        self._lengths: list[int] = []
        self._files = contextlib.ExitStack()
        self._sides = SideWriter(path, self.dtype, self._files)

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self._lengths)

    def __enter__(self) -> "IndexedWriter":
        """Open .bin under a temporary name."""
        self._bin = self._files.enter_context(atomic_open(prefix_path(self.path, ".bin"), "wb"))
        return self

    def add_document(
        self,
        tokens: np.ndarray,
        source: str = "document",
        mask: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        example: np.ndarray | None = None,
    ) -> None:
        """Append a document's tokens to .bin and what else it has to the side files; update the counts.

        Args:
            tokens: ids, integers (n,).
            source: name of the document in messages.
            mask: True or 1 for tokens that count as targets of the loss, (n,). All documents have one, or none has.
            labels: id that is the target in the column of each token, (n,). All documents have them, or none has.
            example: task, difficulty and length of the answer, EXAMPLE (1,). All documents have one, or none has.

        Raises:
            DataError: it is empty, too long, has an id outside the vocabulary, or side values that do not fit.
        """
        if len(tokens) == 0 or len(tokens) > MAX_SEQUENCE:
            raise DataError(f"{source} has {len(tokens)} tokens, outside 1 to {MAX_SEQUENCE}. Drop or split it.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            bad = high if high >= self.vocab_size else low
            problem = f"{source} has id {bad} but vocab_size is {self.vocab_size}"
            raise DataError(f"{problem}. Use the tokenizer of these shards.")
        values = {MASK: mask, LABELS: labels, EXAMPLES: example}
        check_document_values(source, tokens, self.vocab_size, values)
        self._sides.add(source, values)
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)
        self.max_id = max(self.max_id, high)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Write the index and name the files, DataError without a document; after an exception, remove them."""
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            if not self._lengths:
                raise DataError(f"{self.path} would hold no document. Give `rdt prep` more text.")
            # The index first; then the stack closes, and so renames, the side files before .bin. So a .bin always has all.
            self._write_index()

    def _write_index(self) -> None:
        """Write .idx: the header, lengths, pointers, and document starts for one sequence per document."""
        count = len(self._lengths)
        lengths = np.array(self._lengths, "<i4")
        with atomic_open(prefix_path(self.path, ".idx"), "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], count, count + 1))
            file.write(lengths.tobytes())
            file.write(compute_byte_pointers(lengths, self.dtype).tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
