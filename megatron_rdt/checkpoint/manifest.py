"""The manifest of a checkpoint: step, lineage, versions, and the size and SHA-256 of every file.

A directory without a manifest is not a checkpoint. The manifest is written last, before the directory gets its name.
It holds a checksum of itself, so that a flipped bit in it does not change the order of checkpoints unnoticed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.files import sha256_of, write_text
from megatron_rdt.untrusted_files import find_foreign_entry, is_inner_path, is_plain_name, is_regular_file, read_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "rdt-checkpoint", 1
CHECKSUM = "checksum"
TAKE_OLDER = "Use an older checkpoint."


def list_content_files(directory: Path) -> list[Path]:
    """Every file below `directory` except the manifest, sorted."""
    return sorted(p for p in directory.rglob("*") if is_regular_file(p) and p != directory / MANIFEST)


def file_record(path: Path) -> dict[str, Any]:
    """The manifest entry of one file: its size in bytes and hex SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(directory: Path, facts: dict[str, Any] | None = None, files: dict[str, Any] | None = None) -> None:
    """Write `directory`/manifest.json with facts, file entries and a checksum; hash all files if `files` is None.

    Args:
        directory: the checkpoint.
        facts: what to record besides the files (step, tokens, ...); None keeps those of the existing manifest.
        files: entries by relative path, as from `file_record`; None computes them here.
    """
    if facts is None:
        facts = read_manifest(directory)
    facts = {k: v for k, v in facts.items() if k not in ("format", "version", "files", CHECKSUM)}
    if files is None:
        files = {str(p.relative_to(directory)): file_record(p) for p in list_content_files(directory)}
    document = {"format": FORMAT, "version": VERSION, **facts, "files": dict(sorted(files.items()))}
    document[CHECKSUM] = _compute_checksum(document)
    write_text(directory / MANIFEST, json.dumps(document, indent=1) + "\n")


def _compute_checksum(document: dict[str, Any]) -> str:
    """Hex SHA-256 of a manifest's content without its checksum."""
    content = {k: v for k, v in document.items() if k != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest as a dictionary; raise CheckpointError if it is missing, unreadable or damaged."""
    try:
        document = read_json(directory / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: it has no {MANIFEST}. Name a directory step-NNNNNNNN of a run."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read: {error}. {USE_ANOTHER}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{directory / MANIFEST} is not a manifest. {USE_ANOTHER}")
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} is not a checkpoint: the format of its {MANIFEST} is {document.get('format')!r}. Name a run, or a "
            "directory step-NNNNNNNN of one."
        )
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{directory / MANIFEST} has version {document.get('version')!r} of the format, this version reads {VERSION}. "
            "Use the version of megatron_rdt that wrote it."
        )
    # A manifest that another tool wrote may lack the checksum.
    if document.get(CHECKSUM, _compute_checksum(document)) != _compute_checksum(document):
        raise CheckpointError(f"{directory} is damaged: {MANIFEST} has other content than was written. {TAKE_OLDER}")
    if (wrong := _find_wrong_entry(document)) is not None:
        raise CheckpointError(f"{directory / MANIFEST} cannot be used: {wrong}. {TAKE_OLDER}")
    return document


def find_foreign_version(directory: Path) -> int | None:
    """Return the version of a checkpoint's format if it is another than this package writes; None if it has no such."""
    try:
        document = read_json(directory / MANIFEST)
    except (OSError, ValueError):
        return None
    version = document.get("version") if isinstance(document, dict) and document.get("format") == FORMAT else None
    return version if _is_count(version) and version != VERSION else None


def _find_wrong_entry(document: dict[str, Any]) -> str | None:
    """Describe the first entry of a manifest that is not of the kind that is written there; None if all are."""
    for key, is_right in ENTRIES.items():
        if key in document and not is_right(document[key]):
            return f"{key} is {str(document[key])[:40]!r}"
    for key in ("files", "step", "sequence"):
        if key not in document:
            return f"{key} is missing"
    for name, record in document["files"].items():
        if not is_inner_path(name):
            return f"it names the file {name!r}, which is not one below the checkpoint"
        if not isinstance(record, dict) or not _is_count(record.get("bytes")) or not _is_text(record.get("sha256")):
            return f"size or hash of {name} is missing"
    return None


def _is_count(value: Any) -> bool:
    """Return True for a whole number that counts something."""
    return type(value) is int and 0 <= value < 1 << 62


def _is_text(value: Any) -> bool:
    """Return True for a text."""
    return isinstance(value, str)


def _is_table_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check for a dict all of whose values are right."""
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_health(value: Any) -> bool:
    """Return True for what `health.make_health` returns."""
    return (
        isinstance(value, dict)
        and _is_count(value.get("skipped_steps", 0))
        and isinstance(value.get("finite_weights", True), bool)
    )


# Checks of the entries that are read, where a manifest has them.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    "files": _is_table_of(lambda record: True),
    "step": _is_count,
    "sequence": _is_count,
    "tokens": _is_count,
    "world_size": _is_count,
    "parent": lambda value: value is None or is_plain_name(value),
    "ancestors": _is_table_of(_is_count),
    "run_id": lambda value: value is None or _is_text(value),  # None: converted from another project's
    "engine": _is_text,
    "health": _is_health,
    "origin": lambda value: value is None or isinstance(value, dict),
    "milestone": lambda value: isinstance(value, bool),
}


def verify(directory: Path, hashes: bool = True) -> None:
    """Compare every file with the manifest; the first difference raises CheckpointError and names the file.

    A link or pipe anywhere below the directory is one.

    Args:
        directory: the checkpoint.
        hashes: read every byte; False compares presence and sizes only.
    """
    check_files_alone(directory)
    verify_files(directory, read_manifest(directory)["files"].items(), hashes)


def check_files_alone(directory: Path) -> None:
    """Raise CheckpointError if there is anything but files and folders below a checkpoint's directory, such as a link."""
    try:
        found = find_foreign_entry(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}). {TAKE_OLDER}") from None
    if found is not None:
        raise CheckpointError(
            f"{directory} cannot be used: {found}, and a checkpoint holds files of its own only. Put the file itself there "
            "if you know it, or use another checkpoint."
        )


def verify_files(directory: Path, files: Iterable[tuple[str, dict[str, Any]]], hashes: bool = True) -> None:
    """Compare files, pairs of relative path and manifest entry; CheckpointError at the first difference."""
    for name, record in files:
        try:
            difference = _describe_difference(directory / name, record, hashes)
        except OSError as error:
            difference = f"cannot be read ({error.strerror})"
        if difference is not None:
            raise CheckpointError(f"{directory} is damaged: {name} {difference}. {TAKE_OLDER}")


def _describe_difference(path: Path, record: dict[str, Any], hashes: bool) -> str | None:
    """Describe how a file differs from its manifest entry; None if it does not."""
    if not is_regular_file(path):
        return "is missing" if not os.path.lexists(path) else "is a link, or no file"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"has {size} bytes, the manifest says {record['bytes']}"
    if hashes and sha256_of(path) != record["sha256"]:
        return "has other content than was written"
    return None
