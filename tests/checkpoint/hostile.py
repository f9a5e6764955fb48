"""Files of a checkpoint as a broken disk or a stranger leaves them, with a manifest that says that they are right."""

import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rdt.checkpoint import write_manifest
from megatron_rdt.checkpoint.manifest import MANIFEST


class Payload:
    """An object whose unpickling makes a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.directory),)


def pickle_payload(directory: Path) -> bytes:
    """A bare pickle that makes `directory` when it is read."""
    return pickle.dumps(Payload(directory))


def save_payload(directory: Path) -> bytes:
    """A file of `torch.save` that makes `directory` when it is read without restriction."""
    content = io.BytesIO()
    torch.save({"module": Payload(directory)}, content)
    return content.getvalue()


def flip_bits(content: bytes, seed: int) -> bytes:
    """Flip one bit in each of four places, the first near the beginning."""
    draw, changed = random.Random(seed), bytearray(content)
    for place in (draw.randrange(min(len(changed), 200)), *(draw.randrange(len(changed)) for _ in range(3))):
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, Path], bytes]] = {
    "truncated": lambda content, _: content[: len(content) // 2],
    "emptied": lambda content, _: b"",
    "zeroed": lambda content, _: bytes(len(content)),
    "flipped": lambda content, _: flip_bits(content, 1),
    "flipped again": lambda content, _: flip_bits(content, 2),
    "nested": lambda content, _: b"[" * 200_000,
    "pickled": lambda content, directory: pickle_payload(directory),
    "saved by torch": lambda content, directory: save_payload(directory),
}
"""Ways to replace a file's content, given the directory that a payload makes."""


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and record its new hash, so that it counts as undamaged."""
    (checkpoint / name).write_bytes(content)
    if name != MANIFEST:
        write_manifest(checkpoint)


def list_files(checkpoint: Path) -> list[str]:
    """Names of all files of a checkpoint, one of each parameter's folder of a universal one."""
    names, seen = [], set()
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        key = path.name if name.startswith("universal/zero/") else name
        if path.is_file() and key not in seen:
            seen.add(key)
            names.append(name)
    return names
