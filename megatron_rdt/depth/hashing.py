"""Counter-based randomness: a draw is a function of its key, never of a generator's history.

A key is a sequence of integers and strings, such as (seed, "depth", step). The same key yields the same number on
every rank, world size and platform, and after any resume.
"""

import hashlib


def hash64(*key: int | str) -> int:
    """Return an unsigned 64-bit integer, a fixed, well-mixed function of `key` (BLAKE2b of its text form)."""
    # Types are part of the text, and a control character separates the parts, so different keys never share a text.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def hash_uniform(*key: int | str) -> float:
    """A float in the open interval (0, 1) that is a fixed function of `key`, with 52 random bits."""
    return ((hash64(*key) >> 12) + 0.5) * 2.0**-52  # with one bit more, the largest would round to 1
