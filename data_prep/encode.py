"""Documents to token shards: encoded in parallel, put in a global order that no worker count changes."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import xxhash

from data_prep.config import PrepConfig
from megatron_rdt.data.indexed import IndexedWriter, prefix_path, token_dtype
from megatron_rdt.data.tokenizer import Tokenizer
from megatron_rdt.environment import usable_cores
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of

CHUNK_BYTES = 1 << 18
CHUNKS_AHEAD = 4  # per worker: what is waiting to be encoded or to be taken
VALID_SCALE = 10_000

_tokenizer: Tokenizer  # of a worker process


def _start_worker(path: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(path)


def _encode(texts: list[str]) -> list[np.ndarray]:
    """Ids of each text with EOS at the end, in the shards' dtype."""
    dtype = token_dtype(_tokenizer.vocab_size)
    return [np.append(ids, _tokenizer.eos).astype(dtype) for ids in _tokenizer.encode_batch(texts)]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_documents(texts: Iterable[str], tokenizer_path: Path, workers: int) -> Iterator[np.ndarray]:
    """Token arrays of the texts, in their order, from up to `workers` processes (0: one per core).

    Raises:
        DataError: a process was killed.
    """
    workers = workers or usable_cores()
    if workers == 1:
        _start_worker(str(tokenizer_path))
        for chunk in _chunks(texts):
            yield from _encode(chunk)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (str(tokenizer_path),))
    try:
        waiting: deque[Future[list[np.ndarray]]] = deque()
        for chunk in _chunks(texts):
            waiting.append(_submit(executor, chunk))
            if len(waiting) > CHUNKS_AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "an encoding process was killed, by the kernel if memory ran out. Lower --workers, or free memory."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, chunk: list[str]) -> Future[list[np.ndarray]]:
    """Start a worker if one is needed. Ctrl-C reaches all processes; workers leave it to this one, which ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(_encode, chunk)
    finally:
        signal.signal(signal.SIGINT, before)


class Spill:
    """Encoded documents on disk in input order, with what decides their final place.

    Args:
        path: temporary file.
        vocab_size: decides the dtype.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self.dtype = path, token_dtype(vocab_size)
        self._file = open(path, "wb")  # noqa: SIM115
        self.offsets: list[int] = []
        self.lengths: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append one document."""
        self.offsets.append(self._file.tell())
        self.lengths.append(len(tokens))
        self._file.write(tokens.tobytes())

    def finish(self) -> None:
        """Flush what was written."""
        self._file.close()

    def read(self, descriptor: int, index: int) -> np.ndarray:
        """Tokens of document `index`."""
        size = self.lengths[index] * self.dtype.itemsize
        content = os.pread(descriptor, size, self.offsets[index])
        if len(content) != size:
            raise DataError(f"{self.path} ends early: the disk may be full. Free space and run `rdt prep` again.")
        return np.frombuffer(content, self.dtype)


def content_hash(text: str) -> bytes:
    """128-bit hash of a document's content."""
    return xxhash.xxh3_128_digest(text.encode("utf-8"))


def is_valid(digest: bytes, fraction: float) -> bool:
    """Whether a document of this content belongs to the validation split: stable when others come and go."""
    return int.from_bytes(digest, "big") % VALID_SCALE < fraction * VALID_SCALE


def order_key(seed: int, place: str) -> bytes:
    """Sort key of a document in its split: a shuffle that depends on the seed and on where the document stood."""
    return xxhash.xxh3_128_digest(f"{seed}\x1f{place}".encode())


def write_split(
    directory: Path, spill: Spill, order: list[int], config: PrepConfig, vocab_size: int, advance: Callable[[int], None]
) -> list[dict]:
    """Write documents `order` of the spill as shards below `directory`; the manifest's records of them."""
    directory.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    position = 0
    descriptor = os.open(spill.path, os.O_RDONLY)
    try:
        while position < len(order):
            name = f"shard-{len(records):05d}"
            with IndexedWriter(directory / name, vocab_size) as writer:
                size = 0
                while position < len(order):
                    tokens = spill.read(descriptor, order[position])
                    if size and size + tokens.nbytes > config.shard_bytes:
                        break
                    writer.add_document(tokens)
                    size += tokens.nbytes
                    position += 1
                    advance(1)
            bin_path = prefix_path(directory / name, ".bin")
            records.append(
                {
                    "name": name,
                    "tokens": writer.tokens,
                    "documents": writer.documents,
                    "max_id": writer.max_id,
                    "bin_bytes": bin_path.stat().st_size,
                    "bin_sha256": sha256_of(bin_path),
                    "idx_sha256": sha256_of(prefix_path(directory / name, ".idx")),
                }
            )
    finally:
        os.close(descriptor)
    return records
