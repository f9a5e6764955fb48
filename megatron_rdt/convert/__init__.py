"""Checkpoint conversion: to a folder for transformers, and between the checkpoint formats of the engines."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_rdt.errors import CheckpointError, ConfigError, RdtError
from megatron_rdt.files import TEMPORARY_SUFFIX, explain_write_failure, fsync_directory, fsync_file, hold_lock
from megatron_rdt.output_paths import check_can_be_renamed_to, make_parent, resolve_output_directory


def convert(checkpoint: str, out: str, to: str) -> Path:
    """Convert a checkpoint, or a run's newest one; `out` appears only once it is complete and durable.

    Args:
        checkpoint: checkpoint or run directory.
        out: directory to write; must not exist, or be empty.
        to: "hf" (a folder for transformers), "native" (a checkpoint for single, ddp and fsdp) or "zero" (one for
            zero1, zero2 and zero3), the last two with the optimizer's state and for any world size.

    Returns:
        The directory that was written.

    Raises:
        ConfigError: `out` exists and is not empty, or a directory cannot be renamed to it.
        CheckpointError: the checkpoint is damaged or cannot be converted, or `out` cannot be written.
    """
    from megatron_rdt.checkpoint import find_run_or_checkpoint, read_from_checkpoint

    find_run_or_checkpoint(checkpoint)  # a path that leads nowhere leaves no directories
    target = Path(os.path.abspath(resolve_output_directory(out, "OUT")))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty. Choose another OUT or remove it.")
    make_parent(target, "OUT")
    check_can_be_renamed_to(target, "OUT")
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")

    def write(source: Path) -> None:
        """Convert the checkpoint `source` into an empty `temporary`."""
        shutil.rmtree(temporary, ignore_errors=True)  # also what a conversion that was killed has left
        temporary.mkdir()
        if to == "hf":
            from megatron_rdt.convert.hf import export_hf

            export_hf(source, temporary)
        else:
            from megatron_rdt.convert.training_state import convert_training_state

            convert_training_state(source, temporary, to)

    busy = f"another rdt convert is writing {target}. Wait for it, or choose another OUT."
    with hold_lock(target.with_name(f".{target.name}.lock"), busy):
        _publish(target, temporary, lambda: read_from_checkpoint(checkpoint, write), out)
    return target


def _publish(target: Path, temporary: Path, write: Callable[[], None], out: str) -> None:
    """Call `write`, which fills `temporary`, and rename that to `target` once it is durable; it is gone in any case.

    `out` is the user's word for the target, for messages.
    """
    try:
        write()
        _make_durable(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
        fsync_directory(target.parent)
    except RdtError:
        raise
    except Exception as error:  # every library that writes raises errors of its own
        reason = explain_write_failure(error, target.parent)
        if "the disk is" not in reason:
            raise
        remedy = "nothing was left behind. Free space or choose another OUT."
        raise CheckpointError(f"could not write {out}: {reason}; {remedy}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_durable(directory: Path) -> None:
    """Flush every file and then its directory to the disk, innermost directories first."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_file(os.path.join(folder, name))
        fsync_directory(folder)
