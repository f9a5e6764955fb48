"""Listing and copying a tokenizer's files, which may lie in the folder of a model among gigabytes of weights."""

import shutil
from pathlib import Path

from megatron_rdt.data.tokenizer.base import BYTES_FILE, find_tokenizer_file
from megatron_rdt.data.tokenizer.hugging_face_backend import COMPANION_FILES, JSON_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.errors import DataError

TOKENIZER_FILES = (MODEL_FILE, JSON_FILE, *COMPANION_FILES, BYTES_FILE)


def list_tokenizer_files(path: str | Path) -> list[Path]:
    """List a tokenizer's files by name: of a folder all known ones, of a file itself and, for JSON, companions.

    Raises:
        DataError: there is no tokenizer.
    """
    path, file = Path(path), find_tokenizer_file(Path(path))
    names = {file.name, *(COMPANION_FILES if file.suffix == ".json" else ())}
    if path.is_dir():
        names.update(TOKENIZER_FILES)
    return [known for name in sorted(names) if (known := file.parent / name).is_file()]


def _leads_elsewhere(file: Path) -> bool:
    """Return True for a link to a file outside of its folder; the cache of huggingface_hub, made of links, is one folder."""
    folder = file.parent.resolve()
    target = file.resolve()
    hub = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return not target.is_relative_to(folder) and target.parent != hub / "blobs"


def copy_tokenizer_files(path: str | Path, target: Path) -> None:
    """Copy the files of `list_tokenizer_files` into `target`, made if missing; a lone file gets the usual name.

    Raises:
        DataError: there is no tokenizer, or a file of its folder is a link to somewhere else.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in list_tokenizer_files(path):
        if file != Path(path) and _leads_elsewhere(file):
            raise DataError(
                f"{file} is a link out of its folder. What it leads to would be copied and travel with every checkpoint and "
                "export: put the file itself there, if it belongs to the tokenizer."
            )
        name = file.name
        if file == Path(path):
            name = JSON_FILE if file.suffix == ".json" else MODEL_FILE
        shutil.copyfile(file, target / name)
