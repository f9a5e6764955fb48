"""Hugging Face datasets: read once, a shard at a time, and kept beside the scan for the second reading."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.config import PrepConfig
from data_prep.sources.compression import DAMAGED, decompressed
from megatron_rdt.data.hugging_face import dataset_error, open_stream
from megatron_rdt.errors import DataError


def _unreadable(words: str, error: Exception) -> DataError:
    return dataset_error(words, error, "--hf_split")


def shard_count(words: str, config: PrepConfig) -> int:
    """Shards of a dataset, at least 1; DataError where it cannot be opened."""
    try:
        return max(1, int(open_stream(words, config.hf_split).num_shards))
    except Exception as error:
        raise _unreadable(words, error) from error


def shard_records(words: str, config: PrepConfig, index: int, count: int) -> Iterator[Any]:
    """Records of shard `index` of `count`; DataError where they cannot be read."""
    try:
        dataset = open_stream(words, config.hf_split)
        shards = max(1, int(dataset.num_shards))
        stream = iter(dataset.shard(num_shards=count, index=index) if count > 1 else dataset)
    except Exception as error:
        raise _unreadable(words, error) from error
    if shards != count:
        raise DataError(
            f"hf:{words} has {shards} shards and had {count} when this prep began: the dataset has changed. "
            "Run `rdt prep` again with --restart."
        )
    while True:
        try:
            record = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(words, error) from error
        yield record


class Spool:
    """Writes documents as lines of JSON, compressed: [number, prompt, text].

    Args:
        file: open for writing.
    """

    def __init__(self, file: IO[Any]) -> None:
        self._stream = zstandard.ZstdCompressor().stream_writer(file, closefd=False)

    def add(self, number: int, prompt: str, text: str) -> None:
        """Append a document."""
        self._stream.write(json.dumps([number, prompt, text], ensure_ascii=False).encode("utf-8") + b"\n")

    def finish(self) -> None:
        """Write the end."""
        self._stream.close()


def spooled(path: Path) -> Iterator[tuple[int, str, str]]:
    """(number, prompt, text) of what a Spool wrote; DataError where the file is damaged."""
    try:
        with open(path, "rb") as raw:
            for line in decompressed(raw, path):
                number, prompt, text = json.loads(line)
                yield number, prompt, text
    except (*DAMAGED, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it, and run `rdt prep` again.") from error
