"""Lines of JSON: where the first one of a byte range begins, and keys that a parser would silently drop."""

import json
from collections.abc import Iterable
from typing import Any

SKIP_BYTES = 1 << 20


def find_repeated_key(content: str, names: Iterable[str]) -> str:
    """Return the first of these names that an object of JSON has as a key more than once, not within its values; "" if none.

    A parser keeps the last of such values and does not say so.
    """
    # Most lines are decided here, without parsing them again. (A key that is written with other escapes is missed.)
    doubtful = [name for name in names if name and content.count(json.dumps(name)) > 1]
    if not doubtful:
        return ""
    keys: list[str] = []

    def keep_keys(pairs: list[tuple[str, Any]]) -> None:
        """Replace `keys` by those of an object; the outermost object ends last."""
        keys[:] = (key for key, _ in pairs)

    json.loads(content, object_pairs_hook=keep_keys)
    return next((name for name in doubtful if keys.count(name) > 1), "")


def seek_line_start(raw: Any, start: int) -> int:
    """Seek to the first line that begins at byte offset `start` or later; return its offset."""
    raw.seek(start - 1)  # a line begins at `start` if the byte before it ends a line
    while (piece := raw.readline(SKIP_BYTES)) and not piece.endswith(b"\n"):
        pass
    return raw.tell()
