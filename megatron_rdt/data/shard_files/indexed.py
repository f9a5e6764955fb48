"""Megatron's indexed token format, byte for byte: `<prefix>.bin` and `<prefix>.idx`, little endian.

.idx: magic, u64 version 1, u8 dtype code, u64 sequences S, u64 documents + 1, then i32 lengths [S] in tokens,
i64 pointers [S] in bytes, i64 document starts [documents + 1] in sequences. Files open in Megatron-LM, and theirs here.
Reading uses pread: a file that is cut short under a memory map kills the process, a short pread is an error.

A third file, `<prefix>.mask`, is optional and unknown to Megatron: one byte per token of .bin, 1 if the token counts as a
target of the loss and 0 if it does not.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_rdt.data.shard_files.file_identity import identify_file
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
READ_BYTES = 1 << 30  # Linux reads less than 2 GiB at a time
REBUILD = "Run `rdt prep` again with --restart to rebuild the shards."
RESTORE = (
    "Put the former corpus back and resume from the last checkpoint (--resume auto), or start a new --run.name. Prepare "
    "other text into a folder of its own (--out)."
)


class FileReplacedError(DataError):
    """Raised when a file that is read in parts was replaced after the first part."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that Megatron's writers choose: uint16 for vocabularies below 65,500, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY else DTYPES[4]


def prefix_path(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path `<prefix><suffix>`; unlike with_suffix, it keeps a dot in the prefix."""
    return Path(f"{os.fspath(prefix)}{suffix}")


class IndexedDataset:
    """Reads the tokens of one shard, and its index; opening reads the index's header only, whatever its size.

    Args:
        path: the prefix, without .bin and .idx.

    Attributes:
        dtype: of the tokens.
        tokens: number of tokens.
        document_count: number of documents, empty ones included.
        has_mask: True if there is a .mask file.
        identities: of the files that were opened: .idx, .bin and, where there is one, .mask.

    Raises:
        DataError: a file is missing, is not of this format, or has another size than the index implies.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = prefix_path(path, ".bin"), prefix_path(path, ".idx")
        self.mask_path = prefix_path(path, ".mask")
        for file in (self.bin_path, self.idx_path):
            if not file.is_file():
                raise DataError(f"{file} does not exist. {REBUILD}")
        with open(self.idx_path, "rb") as index:
            self.identities = [identify_file(index.fileno())]
            self._read_header(index)
            expected = self._read_end_of_last_sequence(index)
        self._descriptors: list[int] = []
        self._descriptor = self._open(self.bin_path)
        self._mask_descriptor: int | None = None
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
        """Set `tokens` and `has_mask`, and open .mask if there is one.

        Args:
            expected: bytes of .bin by the index.

        Raises:
            DataError: .bin has another size, or .mask has not one byte for each token.
        """
        actual = self.identities[1].size
        if expected != actual:
            raise DataError(f"{self.bin_path} has {actual} bytes, its index says {expected}. {REBUILD}")
        self.tokens = actual // self.dtype.itemsize
        self.has_mask = self.mask_path.is_file()
        if not self.has_mask:
            return
        self._mask_descriptor = self._open(self.mask_path)
        size = self.identities[2].size
        if size != self.tokens:
            due = f"one for each of {self.tokens} tokens is due"
            raise DataError(f"{self.mask_path} has {size} bytes, {due}. {REBUILD}")

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
        return _read_values(self._descriptor, self.bin_path, self.dtype, start, count)

    def prefetch(self, start: int, count: int, masks: bool = False) -> None:
        """Ask the kernel to read these tokens, and their masks, ahead: a disk is faster with many requests at once."""
        if not count or not hasattr(os, "posix_fadvise"):  # the system call takes 0 for everything; macOS has none
            return
        size = self.dtype.itemsize
        with contextlib.suppress(OSError):  # some file systems take no advice
            os.posix_fadvise(self._descriptor, start * size, count * size, os.POSIX_FADV_WILLNEED)
            if masks and self._mask_descriptor is not None:
                os.posix_fadvise(self._mask_descriptor, start, count, os.POSIX_FADV_WILLNEED)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """Read the loss mask of `count` tokens from token `start` on: 1 for a token that counts as a target, uint8 (count,).

        Raises:
            DataError: there is no .mask file, it ends early, or holds another value.
        """
        if self._mask_descriptor is None:
            raise DataError(f"{self.mask_path} does not exist. {REBUILD}")
        mask = _read_values(self._mask_descriptor, self.mask_path, np.dtype("u1"), start, count)
        if count and mask.max() > 1:
            offset = start + int(np.argmax(mask > 1))
            raise DataError(f"{self.mask_path} holds {mask.max()} at byte {offset}, neither 0 nor 1. {REBUILD}")
        return mask

    @cached_property
    def document_starts(self) -> np.ndarray:
        """First token of each document that is not empty, int64 (documents,), ascending."""
        starts = np.append(self.pointers // self.dtype.itemsize, self.tokens)[self.documents]
        return starts[:-1][np.diff(starts) > 0]

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def compute_byte_pointers(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Compute the byte offset of each sequence in .bin, int64 (sequences,), from the lengths in tokens."""
    pointers = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    return pointers


def _read_values(descriptor: int, path: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    """Read `count` values from value `start` of an open file on, shape (count,); DataError if it ends before."""
    size, offset = count * dtype.itemsize, start * dtype.itemsize
    content = _read_bytes(descriptor, path, offset, size)
    while len(content) < size:
        more = _read_bytes(descriptor, path, offset + len(content), size - len(content))
        if not more:
            raise DataError(
                f"{path} ends at token {start + len(content) // dtype.itemsize} while tokens up to {start + count} were "
                f"asked for: it changed while in use. {RESTORE}"
            )
        content += more
    return np.frombuffer(content, dtype)


def _read_bytes(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    """Read up to `size` bytes of an open file from `offset` on; DataError if the disk refuses."""
    try:
        return os.pread(descriptor, min(size, READ_BYTES), offset)
    except OSError as error:  # a bad disk, or a file that another machine deleted while this one had it open (ESTALE)
        raise DataError(
            f"{path} cannot be read from byte {offset:,} on: {error.strerror}. Fix the disk. If the corpus was replaced: "
            f"{RESTORE}"
        ) from error


class IndexedWriter:
    """Writes one shard, one sequence per document, with masks if the documents have them.

    The files get their names when the `with` block ends without an exception, .bin last; otherwise none is left.

    Args:
        path: the prefix.
        vocab_size: every id must be below it; it also decides the dtype.

    Attributes:
        tokens, documents: numbers written so far.
        max_id: largest id written so far.
        has_mask: True if documents have masks; None before the first document.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.tokens = self.max_id = 0
        self.has_mask: bool | None = None
        self._lengths: list[int] = []
        self._files = contextlib.ExitStack()
        self._masks: IO[Any] | None = None

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self._lengths)

    def __enter__(self) -> "IndexedWriter":
        """Open .bin under a temporary name."""
        self._bin = self._files.enter_context(atomic_open(prefix_path(self.path, ".bin"), "wb"))
        return self

    def add_document(self, tokens: np.ndarray, source: str = "document", mask: np.ndarray | None = None) -> None:
        """Append a document's tokens to .bin and its mask, if any, to .mask; update the counts.

        Args:
            tokens: ids, integers (n,).
            source: name of the document in messages.
            mask: True or 1 for tokens that count as targets of the loss, (n,). All documents have one, or none has.

        Raises:
            DataError: it is empty, too long, has an id outside the vocabulary, or a mask that does not fit.
        """
        if len(tokens) == 0 or len(tokens) > MAX_SEQUENCE:
            raise DataError(f"{source} has {len(tokens)} tokens, outside 1 to {MAX_SEQUENCE}. Drop or split it.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            bad = high if high >= self.vocab_size else low
            problem = f"{source} has id {bad} but vocab_size is {self.vocab_size}"
            raise DataError(f"{problem}. Use the tokenizer of these shards.")
        self._add_mask(tokens, source, mask)
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)
        self.max_id = max(self.max_id, high)

    def _add_mask(self, tokens: np.ndarray, source: str, mask: np.ndarray | None) -> None:
        """Append a document's mask; DataError if it does not fit the tokens or only some documents have one."""
        if self.has_mask is None:
            self.has_mask = mask is not None
            if self.has_mask:
                self._masks = self._files.enter_context(atomic_open(prefix_path(self.path, ".mask"), "wb"))
        if self.has_mask != (mask is not None):
            raise DataError(
                f"{source} has {'no mask, those before it have one' if mask is None else 'a mask, those before it have none'}: "
                "give a mask with every document of a shard, or with none."
            )
        if mask is None or self._masks is None:
            return
        if mask.shape != tokens.shape or mask.min() < 0 or mask.max() > 1:
            raise DataError(f"{source} has a mask that is not one 0 or 1 for each of its {len(tokens)} tokens. Fix it.")
        self._masks.write(mask.astype(np.uint8).tobytes())

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Write the index and name the files, DataError without a document; after an exception, remove them."""
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            if not self._lengths:
                raise DataError(f"{self.path} would hold no document. Give `rdt prep` more text.")
            # The index first; then the stack closes, and so renames, .mask before .bin. So a .bin always has both.
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
