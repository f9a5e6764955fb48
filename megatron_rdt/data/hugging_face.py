"""Opening a Hugging Face dataset as a stream; what its library says, as errors for the user."""

from pathlib import Path
from typing import Any

from megatron_rdt.errors import DataError

PREFIX = "hf:"


def open_stream(words: str, split: str) -> Any:
    """The rows of the dataset NAME or NAME:CONFIG, where NAME may be a local path: a `datasets.IterableDataset`.

    Raises:
        Exception: whatever the library, the hub or the network has; see `unreadable`.
    """
    import datasets

    name, _, variant = (words, "", "") if Path(words).exists() else words.partition(":")
    return datasets.load_dataset(name, variant or None, split=split, streaming=True)


def unreadable(words: str, error: Exception, option: str) -> DataError:
    """An error for the user of what the library says.

    Args:
        words: NAME or NAME:CONFIG.
        error: what was raised.
        option: which says what split is read.
    """
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return DataError(
        f"{PREFIX}{words} could not be read as a dataset: {reason}. Check the name (hf:NAME, or hf:NAME:CONFIG where the "
        f"dataset has several configurations), {option} and the network."
    )
