"""The origin of a run: the checkpoint or export of another run that its first step began from.

A run continues from its origin (`--resume PATH`), or takes the weights alone and begins at step 0 (`--init PATH`). Until
it saves a checkpoint of its own, only `origin.json` in its directory says so. That is written before the first step; a
run that is resumed before its first save starts from the origin again, in the same way. Later every manifest has a copy.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rdt.checkpoint.lineage import list_complete_checkpoints
from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import sha256_of, write_text
from megatron_rdt.run_directory import CHECKPOINTS, LATEST, ORIGIN
from megatron_rdt.untrusted_files import read_json

# In a folder that `rdt convert --to hf` wrote: the weights, or the index of the files that hold them.
EXPORT_WEIGHTS, EXPORT_INDEX = "model.safetensors", "model.safetensors.index.json"
# The hash that tells an origin from all others: of a checkpoint's manifest, of an export's weights.
IDENTITIES = ("manifest_sha256", "weights_sha256")


class Start(NamedTuple):
    """The checkpoint or export from which a run begins or continues.

    Attributes:
        source: its directory; every byte of a checkpoint has been verified.
        weights_only: the run takes its weights and nothing else, and begins at step 0.
    """

    source: Path
    weights_only: bool = False


def write_origin(run_directory: Path, start: Start) -> dict[str, Any]:
    """Write origin.json durably and return its content: path, run id, step, hash, and if only weights are taken."""
    manifest = read_manifest(start.source) if (start.source / MANIFEST).is_file() else {}
    record = {
        "checkpoint": os.path.abspath(start.source),
        "run_id": manifest.get("run_id"),
        "step": manifest.get("step"),
        "weights_only": start.weights_only,
        **_identify(start.source),
    }
    write_text(run_directory / ORIGIN, json.dumps(record, indent=1) + "\n")
    return record


def has_export_weights(directory: Path) -> bool:
    """Return True if a folder has the weights of an export, in one file or several, complete or not."""
    return (directory / EXPORT_WEIGHTS).is_file() or (directory / EXPORT_INDEX).is_file()


def _identify(source: Path) -> dict[str, str]:
    """The entry of `IDENTITIES` that a directory has, with its hash; {} for any other directory."""
    of_checkpoint, of_export = IDENTITIES
    if (source / MANIFEST).is_file():
        return {of_checkpoint: sha256_of(source / MANIFEST)}
    if (source / EXPORT_WEIGHTS).is_file():
        return {of_export: sha256_of(source / EXPORT_WEIGHTS)}
    if (source / EXPORT_INDEX).is_file():  # it is the same for all weights of these names: the files tell them apart
        files = sorted(source.glob("*.safetensors"))
        return {of_export: hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()}
    return {}


def read_origin(run_directory: Path) -> dict[str, Any] | None:
    """Return the content of origin.json; None for a run that began from random weights.

    Raises:
        CheckpointError: there is a record, and it cannot be read.
    """
    path = run_directory / ORIGIN
    try:
        record = read_json(path)
        identity = next((key for key in IDENTITIES if key in record), IDENTITIES[0])
        if not isinstance(record["checkpoint"], str):
            raise TypeError("checkpoint is no path")
        return {"weights_only": False, **record, **{key: record[key] for key in ("checkpoint", "run_id", identity)}}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} says which checkpoint the run began from, and cannot be read ({error!r}). Put it back from a copy, or "
            "choose another --run.name."
        ) from None


def recall_origin(run_directory: Path) -> dict[str, Any] | None:
    """Return the content of origin.json or, where that is gone, the copy in the newest checkpoint; None if neither is."""
    record = read_origin(run_directory)
    own = list_complete_checkpoints(run_directory) if record is None else []
    return read_manifest(own[-1]).get("origin") if own else record


def is_origin(run_directory: Path, source: Path) -> bool:
    """Return True if the run continued from this checkpoint, wherever it is now, with more than its weights."""
    record = read_origin(run_directory)
    return record is not None and not record["weights_only"] and _has_identity(source, record)


def is_origin_of_weights(record: dict[str, Any] | None, init: str) -> bool:
    """Return True if a run whose origin is `record` began from what --init names: it, its run, or a copy of it."""
    if record is None or not record["weights_only"]:
        return False
    named, origin = Path(os.path.abspath(init)), Path(record["checkpoint"])
    # The origin may be gone, and its run may have saved newer checkpoints since.
    names = [origin, *origin.parents[:2]] if origin.parent.name == CHECKPOINTS else [origin]
    named = named.parent if named.name == LATEST and not named.is_dir() else named
    is_named = named.resolve() in [name.resolve() for name in names]
    return is_named or any(_has_identity(directory, record) for directory in _list_candidates(init, record))


def _list_candidates(init: str, record: dict[str, Any]) -> list[Path]:
    """Directories that may hold a copy of the origin where --init names that, or a copy of its run."""
    named = Path(init)
    run = named.parent if named.name in (CHECKPOINTS, LATEST) else named
    return [named, run / CHECKPOINTS / Path(record["checkpoint"]).name]


def _has_identity(source: Path, record: dict[str, Any]) -> bool:
    """Return True if a directory holds the very checkpoint or export of an origin's record."""
    identity = _identify(source)
    return bool(identity) and identity.items() <= record.items()


def find_origins(run_directory: Path, init: str) -> list[Start]:
    """The start that the run once made, at each place that has it, not verified; none if it began from random weights.

    Args:
        run_directory: `runs/<name>`.
        init: the value of --init, which may name a copy of the origin.

    Raises:
        CheckpointError: it is no longer there, or is another one now.
    """
    record = read_origin(run_directory)
    if record is None:
        return []
    source = Path(record["checkpoint"])
    places = dict.fromkeys((source, *_list_candidates(init, record)))
    origins = [Start(place, record["weights_only"]) for place in places if _has_identity(place, record)]
    if origins:
        return origins
    change = "holds another checkpoint now" if source.is_dir() else "does not exist any more"
    raise CheckpointError(describe_lost_origin(run_directory, Start(source, record["weights_only"]), change))


def describe_lost_origin(run_directory: Path, origin: Start, change: str) -> str:
    """The message for a run that cannot begin again, with what happened to its origin: "is gone"."""
    option = "--init PATH --resume auto" if origin.weights_only else "--resume PATH"
    return (
        f"{run_directory} has not saved a checkpoint yet, and {origin.source}, which it began from, {change}. Put that one "
        f"back, or name a copy of it: {option}. To start anew, choose another --run.name."
    )


def describe_origin(record: dict[str, Any] | None) -> str:
    """Name the origin in a record of `read_origin`, to follow "began from"."""
    if record is None:
        return "random weights"
    return f"the weights of {record['checkpoint']}" if record["weights_only"] else record["checkpoint"]
