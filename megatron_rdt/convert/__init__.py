"""Checkpoints out: for transformers."""

import os
import shutil
from pathlib import Path

from megatron_rdt.errors import ConfigError


def convert(checkpoint: str, out: str, to: str) -> Path:
    """Convert a checkpoint (or a run's newest); `out` appears when it is complete.

    Args:
        checkpoint: checkpoint or run directory.
        out: directory to write; must not exist, or be empty.
        to: "hf"; checkpoints of other engines are not converted yet.
    """
    from megatron_rdt.checkpoint import resolve_checkpoint, verify

    source, target = resolve_checkpoint(checkpoint), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty. Choose another OUT or remove it.")
    verify(source)
    if to != "hf":
        raise ConfigError(f"--to {to} is not available in this version. Use --to hf.")
    from megatron_rdt.convert.hf import export_hf

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        export_hf(source, temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
