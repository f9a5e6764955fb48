"""Checkpoints in and out: for transformers, and between engines."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_rdt.errors import ConfigError


def convert(checkpoint: str, out: str, to: str) -> Path:
    """Convert a checkpoint (or a run's newest); `out` appears when it is complete.

    Args:
        checkpoint: checkpoint or run directory.
        out: directory to write; must not exist, or be empty.
        to: "hf", "zero" or "fsdp".
    """
    from megatron_rdt.checkpoint import resolve_checkpoint, verify

    source, target = resolve_checkpoint(checkpoint), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty. Choose another OUT or remove it.")
    verify(source)
    write: Callable[[Path, Path], None]
    if to == "hf":
        from megatron_rdt.convert.hf import export_hf as write
    elif to == "zero":
        from megatron_rdt.convert.engines import native_to_zero as write
    elif to == "fsdp":
        from megatron_rdt.convert.engines import zero_to_native as write
    else:
        raise ConfigError(f"--to {to} is not known. Use hf, zero or fsdp.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write(source, temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
