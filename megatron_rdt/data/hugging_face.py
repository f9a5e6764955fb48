"""Opening a Hugging Face dataset as a stream of rows, and turning the library's exceptions into errors for the user."""

import os
from pathlib import Path
from typing import Any

from megatron_rdt.errors import DataError

PREFIX = "hf:"
LONGEST_REASON = 300  # characters of an exception of the library that a message quotes
# Beginnings of the names of files that describe a dataset and hold none of its rows.
DESCRIPTIONS = ("README", "LICENSE", "dataset_info", ".git", ".DS_Store")


def _split_name(name: str) -> tuple[str, str | None]:
    """Split NAME or NAME:CONFIG into name and configuration, None without one; an existing path is left whole."""
    path, _, variant = (name, "", "") if Path(name).exists() else name.partition(":")
    return path, variant or None


def open_stream(name: str, split: str) -> Any:
    """Open the rows of the dataset NAME or NAME:CONFIG, where NAME may be a local path, as a `datasets.IterableDataset`.

    Raises:
        Exception: whatever the library, the hub or the network raises; see `dataset_error`.
    """
    import datasets

    return datasets.load_dataset(*_split_name(name), split=split, streaming=True)


def list_unread_files(name: str) -> list[str]:
    """List, sorted, a local folder's files that are in no split, READMEs and the like aside; empty for the hub.

    The library takes the files of one format only, and guesses from their names which split they belong to.
    """
    path, variant = _split_name(name)
    folder = Path(path)
    if not folder.is_dir():
        return []
    import datasets

    splits = datasets.load_dataset_builder(path, variant).config.data_files or {}
    taken = {os.path.realpath(file) for files in splits.values() for file in files}
    found = [Path(directory, file) for directory, _, files in os.walk(folder) for file in files]
    left_out = [str(file.relative_to(folder)) for file in found if os.path.realpath(file) not in taken]
    return sorted(
        file for file in left_out if not Path(file).name.startswith(DESCRIPTIONS) and not file.startswith(".git")
    )


def describe_exception(error: Exception) -> str:
    """Return an exception's message in one line without its full stop, its beginning if it is long, or its type if empty."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]} ..."
    return text.rstrip(".") if text else type(error).__name__


def dataset_error(name: str, error: Exception, option: str) -> DataError:
    """Build the error for a dataset that could not be read, from the library's exception.

    Args:
        name: NAME or NAME:CONFIG.
        error: the exception.
        option: the option that selects the split, for the remedy.
    """
    reason = describe_exception(error)
    return DataError(
        f"{PREFIX}{name} could not be read as a dataset: {reason}. Check the name (hf:NAME, or hf:NAME:CONFIG where the "
        f"dataset has several configurations), {option} and the network."
    )
