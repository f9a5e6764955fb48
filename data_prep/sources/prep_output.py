"""Folders that `rdt prep` wrote, which are no text: the output of this prep and of others may lie in a source folder."""

import json
import os
from pathlib import Path

from megatron_rdt.data.shard_files.corpus_manifest import FORMAT, MANIFEST

PREP_OUTPUT = "output of rdt prep"  # in the list of what is not read
# Folders beside a corpus NAME, while it is made or replaced: `.NAME.prep` and so on.
WORK_ENDINGS = (".prep", ".import", ".replaced", ".deleted")
DESCRIPTION = "plan.json"  # in `.NAME.prep`: the options and the input of an unfinished prep


def list_own_paths(out: Path) -> set[str]:
    """Return the path of the corpus that is made, without links, and those of its working directories and lock."""
    return {str(out), *(str(out.with_name(f".{out.name}{ending}")) for ending in (*WORK_ENDINGS, ".lock"))}


def is_prep_output(folder: str) -> bool:
    """Return True if a folder is a prepared corpus, or a directory in which a corpus is made or replaced."""
    if _has_manifest(folder):
        return True
    name = os.path.basename(folder)
    if not (name.startswith(".") and name.endswith(WORK_ENDINGS)):
        return False
    return os.path.isfile(os.path.join(folder, DESCRIPTION)) or _has_manifest(os.path.join(folder, "corpus"))


def _has_manifest(folder: str) -> bool:
    """Return True if a folder holds the manifest of a corpus of ours."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        return False
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (OSError, ValueError, RecursionError):  # not a manifest of ours, at least not one that can be used
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT
