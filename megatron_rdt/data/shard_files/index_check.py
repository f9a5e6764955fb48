"""What is wrong with an index, at which bytes: `rdt prep verify` reads it here, whatever state it is in."""

from typing import NamedTuple

import numpy as np

from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, VERSION

# Fields of the header: first byte, one past the last, name.
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
        what: what they hold, as in "bytes 1 to 2 hold ...".
    """

    first: int
    end: int
    what: str


class Index(NamedTuple):
    """What could be read of an index.

    Attributes:
        damages: what cannot be right.
        ends: one past the last token of every document that has tokens, int64; None where damages leave that open.
    """

    damages: list[Damage]
    ends: np.ndarray | None


def read_index(content: bytes, dtype: np.dtype, documents: int, tokens: int, sequences: int | None = None) -> Index:
    """Compare an index with what the manifest implies, and its arrays with each other.

    Args:
        content: of the .idx file.
        dtype: of the tokens.
        documents: how many there should be.
        tokens: how many there should be.
        sequences: how many there should be; None where every document is one.
    """
    single = sequences is None
    sequences = documents if sequences is None else sequences
    damages = _header(content, dtype, sequences, documents)
    size = HEADER.size + 12 * sequences + 8 * (documents + 1)
    if len(content) not in (size, size + sequences):
        start = min(len(content), size)
        damages.append(
            Damage(start, start, f"is where it ends or should: it has {len(content):,} bytes, {size:,} are due")
        )
        return Index(damages, None)
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    starts = np.frombuffer(content, "<i8", documents + 1, HEADER.size + 12 * sequences)
    wrong = [_sequences(lengths, pointers, dtype.itemsize, tokens), _documents(starts, sequences, single)]
    damages += [damage for damage in wrong if damage is not None]
    if any(damage is not None for damage in wrong):
        return Index(damages, None)
    ends = np.append(0, np.cumsum(lengths, dtype=np.int64))[starts]
    return Index(damages, ends[1:][np.diff(ends) > 0])


def _header(content: bytes, dtype: np.dtype, sequences: int, documents: int) -> list[Damage]:
    due = HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1)
    return [
        Damage(first, end, f"({name}) hold {content[first:end].hex(' ')}, not {due[first:end].hex(' ')}")
        for first, end, name in HEADER_FIELDS
        if content[first:end] != due[first:end] and len(content) >= end
    ]


def _sequences(lengths: np.ndarray, pointers: np.ndarray, itemsize: int, tokens: int) -> Damage | None:
    """The first length or pointer that does not fit the others.

    Every length is written twice, as itself and as the distance of two pointers. Where only one distance is off, its
    length is wrong; where two neighbouring ones are off and their sum is right, the pointer between them is.
    """
    count = len(lengths)
    bounds = np.append(pointers, tokens * itemsize)
    off = np.diff(bounds) - lengths.astype(np.int64) * itemsize
    bad = np.flatnonzero((off != 0) | (lengths < 0))
    if count and bounds[0] != 0:
        return Damage(*_pointer(0, count), f"(pointer of sequence 0) hold {bounds[0]}, not 0")
    if not len(bad):
        return None
    first = int(bad[0])
    following = first + 1
    if following < count and off[first : first + 2].sum() == 0:  # modulo 2**64
        due = int(bounds[first] + lengths[first].astype(np.int64) * itemsize)
        return Damage(
            *_pointer(following, count), f"(pointer of sequence {following}) hold {pointers[following]}, not {due}"
        )
    place = HEADER.size + 4 * first
    due = int(bounds[following] - bounds[first])
    if following < count and off[following]:
        return Damage(place, place + 4, f"(length of sequence {first}) or later ones do not fit the pointers")
    return Damage(place, place + 4, f"(length of sequence {first}) hold {lengths[first]}, not {due / itemsize:.10g}")


def _pointer(index: int, count: int) -> tuple[int, int]:
    first = HEADER.size + 4 * count + 8 * index
    return first, first + 8


def _documents(starts: np.ndarray, sequences: int, single: bool) -> Damage | None:
    """The first document start that cannot be: the first is 0, the last is the number of sequences, none goes back."""
    place = HEADER.size + 12 * sequences
    if single:  # which number stands where is known
        wrong = np.flatnonzero(starts != np.arange(sequences + 1))
    else:
        wrong = np.flatnonzero((starts < 0) | (starts > sequences))
    known = [
        (0, 0),
        (len(starts) - 1, sequences),
        *((int(index), int(index) if single else None) for index in wrong[:1]),
    ]
    for index, due in known:
        if due is None or starts[index] != due:
            first = place + 8 * index
            instead = "which no sequence is" if due is None else f"not {due}"
            return Damage(first, first + 8, f"(start of document {index}) hold {starts[index]}, {instead}")
    back = np.flatnonzero(np.diff(starts) < 0)
    if not len(back):
        return None
    index = int(back[0])
    first = place + 8 * index
    return Damage(
        first, first + 16, f"(starts of documents {index} and {index + 1}) hold {starts[index]} and {starts[index + 1]}"
    )
