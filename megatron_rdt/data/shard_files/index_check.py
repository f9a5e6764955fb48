"""Check of an .idx file in any state: finds the bytes that cannot be right, for `rdt prep verify`."""

from typing import NamedTuple

import numpy as np

from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, VERSION

# First byte, one past the last byte, and name of each field of the header.
HEADER_FIELDS = (
    (0, 9, "magic"),
    (9, 17, "version"),
    (17, 18, "type code"),
    (18, 26, "sequences"),
    (26, 34, "documents"),
)


class Damage(NamedTuple):
    """Bytes of a file that cannot be right.

    Attributes:
        first, end: the range [first, end) in bytes.
        problem: predicate of a message whose subject is the range, as in "bytes 1 to 2 hold ...".
    """

    first: int
    end: int
    problem: str


class CheckedIndex(NamedTuple):
    """Result of checking an index.

    Attributes:
        damages: bytes that cannot be right.
        ends: one past the last token of every document that is not empty, int64; None where damages leave it unknown.
    """

    damages: list[Damage]
    ends: np.ndarray | None


def check_index(content: bytes, dtype: np.dtype, documents: int, tokens: int, sequences: int | None) -> CheckedIndex:
    """Find bytes of an index that contradict the manifest or each other; return them and the documents' ends.

    Args:
        content: of the .idx file.
        dtype: of the tokens.
        documents, tokens: their numbers according to the manifest.
        sequences: number of sequences according to the manifest; None if every document is one sequence.
    """
    one_per_document = sequences is None
    sequences = documents if sequences is None else sequences
    damages = _check_header(content, dtype, sequences, documents)
    size = HEADER.size + 12 * sequences + 8 * (documents + 1)
    if len(content) not in (size, size + sequences):
        start = min(len(content), size)
        problem = f"is where it ends or should: it has {len(content):,} bytes, {size:,} are due"
        damages.append(Damage(start, start, problem))
        return CheckedIndex(damages, None)
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    starts = np.frombuffer(content, "<i8", documents + 1, HEADER.size + 12 * sequences)
    wrong = [_check_sequences(lengths, pointers, dtype.itemsize, tokens)]
    wrong += [_check_document_starts(starts, sequences, one_per_document)]
    if found := [damage for damage in wrong if damage is not None]:
        return CheckedIndex(damages + found, None)
    ends = np.append(0, np.cumsum(lengths, dtype=np.int64))[starts]
    return CheckedIndex(damages, ends[1:][np.diff(ends) > 0])


def _check_header(content: bytes, dtype: np.dtype, sequences: int, documents: int) -> list[Damage]:
    """Find the fields of the header that differ from those that the manifest implies."""
    due = HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1)
    return [
        Damage(first, end, f"({name}) hold {content[first:end].hex(' ')}, not {due[first:end].hex(' ')}")
        for first, end, name in HEADER_FIELDS
        if content[first:end] != due[first:end] and len(content) >= end
    ]


def _check_sequences(lengths: np.ndarray, pointers: np.ndarray, itemsize: int, tokens: int) -> Damage | None:
    """Find the first length or pointer that does not fit the others; None if all do.

    Every length is written twice, as itself and as the distance of two pointers. If a single distance is off, its length
    is wrong. If two neighbouring distances are off and their sum is right, the pointer between them is wrong.
    """
    count = len(lengths)
    bounds = np.append(pointers, tokens * itemsize)
    # Zero where the distance of two pointers is the length between them.
    off = np.diff(bounds) - lengths.astype(np.int64) * itemsize
    bad = np.flatnonzero((off != 0) | (lengths < 0))
    if count and bounds[0] != 0:
        return Damage(*_pointer_bytes(0, count), f"(pointer of sequence 0) hold {bounds[0]}, not 0")
    if not len(bad):
        return None
    first = int(bad[0])
    following = first + 1
    # A damaged int64 may overflow: the sum is right modulo 2**64.
    if following < count and off[first : first + 2].sum() == 0:
        due = int(bounds[first] + lengths[first].astype(np.int64) * itemsize)
        problem = f"(pointer of sequence {following}) hold {pointers[following]}, not {due}"
        return Damage(*_pointer_bytes(following, count), problem)
    offset = HEADER.size + 4 * first
    due = int(bounds[following] - bounds[first])
    if following < count and off[following]:
        return Damage(offset, offset + 4, f"(length of sequence {first}) or later ones do not fit the pointers")
    return Damage(offset, offset + 4, f"(length of sequence {first}) hold {lengths[first]}, not {due / itemsize:.10g}")


def _pointer_bytes(index: int, count: int) -> tuple[int, int]:
    """Return the byte range of the pointer of sequence `index` of `count`."""
    first = HEADER.size + 4 * count + 8 * index
    return first, first + 8


def _check_document_starts(starts: np.ndarray, sequences: int, one_per_document: bool) -> Damage | None:
    """Find an impossible document start, None if there is none: they ascend from 0 to the number of sequences."""
    offset = HEADER.size + 12 * sequences
    if one_per_document:  # every start is known exactly
        wrong = np.flatnonzero(starts != np.arange(sequences + 1))
    else:
        wrong = np.flatnonzero((starts < 0) | (starts > sequences))
    # Index of a start and the value it must have; None if only its range is known.
    first_wrong = [(index, index if one_per_document else None) for index in wrong[:1].tolist()]
    known: list[tuple[int, int | None]] = [(0, 0), (len(starts) - 1, sequences), *first_wrong]
    for index, due in known:
        if due is None or starts[index] != due:
            first = offset + 8 * index
            instead = "which no sequence is" if due is None else f"not {due}"
            return Damage(first, first + 8, f"(start of document {index}) hold {starts[index]}, {instead}")
    decreasing = np.flatnonzero(np.diff(starts) < 0)
    if not len(decreasing):
        return None
    index = int(decreasing[0])
    first = offset + 8 * index
    problem = f"(starts of documents {index} and {index + 1}) hold {starts[index]} and {starts[index + 1]}"
    return Damage(first, first + 16, problem)
