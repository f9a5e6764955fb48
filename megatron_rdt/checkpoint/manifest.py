"""The manifest of a checkpoint: step, lineage, versions, and the size and SHA-256 of every file.

A directory without a manifest is not a checkpoint. The manifest is written last, before the directory gets its name.
It holds a checksum of itself, so that a flipped bit in it does not change the order of checkpoints unnoticed.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import sha256_of, write_text

MANIFEST = "manifest.json"
FORMAT, VERSION = "rdt-checkpoint", 1
CHECKSUM = "checksum"
TAKE_OLDER = "Use an older checkpoint."


def list_content_files(directory: Path) -> list[Path]:
    """Every file below `directory` except the manifest, sorted."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)


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
        document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: it has no {MANIFEST}. Name a directory step-NNNNNNNN of a run."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read: {error}. Use another checkpoint.") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{directory / MANIFEST} is not a manifest. Use another checkpoint.")
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
    return document


def verify(directory: Path, hashes: bool = True) -> None:
    """Compare every file with the manifest; the first difference raises CheckpointError and names the file.

    Args:
        directory: the checkpoint.
        hashes: read every byte; False compares presence and sizes only.
    """
    verify_files(directory, read_manifest(directory)["files"].items(), hashes)


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
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"has {size} bytes, the manifest says {record['bytes']}"
    if hashes and sha256_of(path) != record["sha256"]:
        return "has other content than was written"
    return None
