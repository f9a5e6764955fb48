"""Opening a Hugging Face dataset as a stream of rows, and turning the library's exceptions into errors for the user."""

from pathlib import Path
from typing import Any

from megatron_rdt.errors import DataError

PREFIX = "hf:"


def open_stream(name: str, split: str) -> Any:
    """Open the rows of the dataset NAME or NAME:CONFIG, where NAME may be a local path, as a `datasets.IterableDataset`.

    Raises:
        Exception: whatever the library, the hub or the network raises; see `dataset_error`.
    """
    import datasets

    name, _, variant = (name, "", "") if Path(name).exists() else name.partition(":")
    return datasets.load_dataset(name, variant or None, split=split, streaming=True)


def dataset_error(name: str, error: Exception, option: str) -> DataError:
    """Build the error for a dataset that could not be read, from the library's exception.

    Args:
        name: NAME or NAME:CONFIG.
        error: the exception.
        option: the option that selects the split, for the remedy.
    """
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return DataError(
        f"{PREFIX}{name} could not be read as a dataset: {reason}. Check the name (hf:NAME, or hf:NAME:CONFIG where the "
        f"dataset has several configurations), {option} and the network."
    )
