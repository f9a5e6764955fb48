"""The manifest of a checkpoint: what it is, and the size and SHA-256 of every file in it.

A directory without a manifest is not a checkpoint. The manifest is written last, before the directory gets its name.
"""

import json
from pathlib import Path
from typing import Any

from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import sha256_of, write_text

MANIFEST = "manifest.json"
FORMAT, VERSION = "rdt-checkpoint", 1


def content_files(directory: Path) -> list[Path]:
    """Every file below `directory` but the manifest, sorted."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and hex SHA-256 of one file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(directory: Path, facts: dict[str, Any] | None = None, files: dict[str, Any] | None = None) -> None:
    """Write `directory`/manifest.json.

    Args:
        directory: the checkpoint.
        facts: what to record beside the files (step, tokens, ...); None keeps those of the manifest that is there.
        files: records by relative path; None computes them here.
    """
    if facts is None:
        facts = {k: v for k, v in read_manifest(directory).items() if k not in ("format", "version", "files")}
    if files is None:
        files = {str(p.relative_to(directory)): file_record(p) for p in content_files(directory)}
    document = {"format": FORMAT, "version": VERSION, **facts, "files": dict(sorted(files.items()))}
    write_text(directory / MANIFEST, json.dumps(document, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest as a dictionary; CheckpointError where there is none or it is not one."""
    try:
        document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: it has no {MANIFEST}. Name a directory step-NNNNNNNN of a run."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read: {error}. Use another checkpoint.") from None
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise CheckpointError(
            f"{directory / MANIFEST} is of format {document.get('format')!r} version {document.get('version')!r}, "
            f"this version reads {FORMAT!r} {VERSION}. Use the version of megatron_rdt that wrote it."
        )
    return document


def verify(directory: Path, hashes: bool = True) -> None:
    """Compare every file with the manifest; the first difference raises CheckpointError and names the file.

    Args:
        directory: the checkpoint.
        hashes: read every byte; False compares presence and sizes only.
    """
    for name, record in read_manifest(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} is damaged: {name} is missing. Use an older checkpoint.")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} has {size} bytes, the manifest says {record['bytes']}. "
                "Use an older checkpoint."
            )
        if hashes and sha256_of(path) != record["sha256"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} has other content than was written. Use an older one."
            )
