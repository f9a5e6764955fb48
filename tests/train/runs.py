"""Helpers to read what a run wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rdt.config import RunConfig

Configure = Callable[..., RunConfig]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file, one object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_all_files(run: Path) -> dict[str, bytes]:
    """Content of every file of a run by path, except the lock and the record of the last start's failure."""
    apart = (".lock", "failure.json")
    return {str(p): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name not in apart}
