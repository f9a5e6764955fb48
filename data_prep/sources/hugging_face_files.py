"""Hugging Face datasets: each shard is streamed once and spooled to a file, which the second reading uses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.config import PrepConfig
from data_prep.sources.compression import DAMAGED, open_decompressed
from megatron_rdt.data.hugging_face import dataset_error, open_stream
from megatron_rdt.errors import DataError


def count_dataset_shards(name: str, config: PrepConfig) -> int:
    """Return the number of shards of a dataset, at least 1; DataError if it cannot be opened."""
    try:
        return max(1, int(open_stream(name, config.hf_split).num_shards))
    except Exception as error:
        raise dataset_error(name, error, "--hf_split") from error


def read_dataset_shard(name: str, config: PrepConfig, index: int, count: int) -> Iterator[Any]:
    """Yield records of shard `index` of `count`; DataError if unreadable, or if there are not `count` shards."""
    try:
        dataset = open_stream(name, config.hf_split)
        shards = max(1, int(dataset.num_shards))
        stream = iter(dataset.shard(num_shards=count, index=index) if count > 1 else dataset)
    except Exception as error:
        raise dataset_error(name, error, "--hf_split") from error
    if shards != count:
        raise DataError(
            f"hf:{name} has {shards} shards and had {count} when this prep began: the dataset has changed. "
            "Run `rdt prep` again with --restart."
        )
    # Only the reading is in the try block: an exception of the consumer must not look like one of the dataset.
    while True:
        try:
            record = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise dataset_error(name, error, "--hf_split") from error
        yield record


class SpoolWriter:
    """Writes documents as zstd-compressed JSON lines: [number, prompt, text].

    Args:
        file: open for writing.
    """

    def __init__(self, file: IO[Any]) -> None:
        self._stream = zstandard.ZstdCompressor().stream_writer(file, closefd=False)

    def add(self, number: int, prompt: str, text: str) -> None:
        """Append a document."""
        self._stream.write(json.dumps([number, prompt, text], ensure_ascii=False).encode("utf-8") + b"\n")

    def finish(self) -> None:
        """Write the end of the compressed stream; the file stays open."""
        self._stream.close()


def read_spool(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (number, prompt, text) of the documents in a spool file; DataError if it is damaged."""
    try:
        with open(path, "rb") as raw:
            for line in open_decompressed(raw, path):
                number, prompt, text = json.loads(line)
                yield number, prompt, text
    except (*DAMAGED, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it, and run `rdt prep` again.") from error
