"""The origin of a run: the checkpoint of another run, or a converted one, that its first step continued from.

Until the run saves a checkpoint of its own, only `origin.json` in its directory says so. It is written before the first
step; a run that is resumed before its first save starts from the origin again.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import sha256_of, write_text
from megatron_rdt.run_directory import ORIGIN


def write_origin(run_directory: Path, source: Path) -> None:
    """Write origin.json durably: path, run id and manifest hash of `source`, where the run begins."""
    record = {
        "checkpoint": os.path.abspath(source),
        "run_id": read_manifest(source).get("run_id"),
        "manifest_sha256": sha256_of(source / MANIFEST),
    }
    write_text(run_directory / ORIGIN, json.dumps(record, indent=1) + "\n")


def read_origin(run_directory: Path) -> dict[str, Any] | None:
    """Return {checkpoint, run_id, manifest_sha256} of origin.json; None for a run that began from random weights.

    Raises:
        CheckpointError: there is a record, and it cannot be read.
    """
    path = run_directory / ORIGIN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("checkpoint", "run_id", "manifest_sha256")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} says which checkpoint the run began from, and cannot be read ({error!r}). Name the checkpoint: "
            "--resume PATH."
        ) from None


def is_origin(run_directory: Path, source: Path) -> bool:
    """Return True if the run began from this checkpoint, wherever it is now."""
    record = read_origin(run_directory)
    manifest = source / MANIFEST
    return record is not None and manifest.is_file() and sha256_of(manifest) == record["manifest_sha256"]


def find_origin(run_directory: Path) -> Path | None:
    """The checkpoint that the run began from, not verified yet; None for a run that began from random weights.

    Raises:
        CheckpointError: it is no longer there, or is another one now.
    """
    record = read_origin(run_directory)
    if record is None:
        return None
    source = Path(record["checkpoint"])
    if is_origin(run_directory, source):
        return source
    change = "holds another checkpoint now" if source.is_dir() else "does not exist any more"
    raise CheckpointError(
        f"{run_directory} has not saved a checkpoint yet, and {source}, which it began from, {change}. Put that one back, "
        "or name a copy of it: --resume PATH. To start anew, choose another --run.name."
    )
