"""Conversion: checkpoints to a folder for transformers and between the engines' formats, other projects' models to both."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rdt.errors import CheckpointError, ConfigError, RdtError
from megatron_rdt.files import TEMPORARY_SUFFIX, explain_write_failure, find_write_error, fsync_directory, fsync_file
from megatron_rdt.locks import check_locks, has_lost_lock, hold_lock
from megatron_rdt.output_paths import check_can_be_renamed_to, make_parent, resolve_output_directory
from megatron_rdt.run_directory import CHECKPOINTS, LATEST

if TYPE_CHECKING:
    from megatron_rdt.convert.hf import ExportOptions
    from megatron_rdt.convert.import_plan import ImportPlan
    from megatron_rdt.convert.recognize import ImportOptions


def convert(
    source: str, out: str, to: str, options: "ImportOptions | None" = None, export: "ExportOptions | None" = None
) -> Path:
    """Convert a checkpoint, a run's newest one, or another model; `out` appears only once it is complete and durable.

    Args:
        source: checkpoint or run directory; or a folder or file of another project's model or of an export.
        out: directory to write; must not exist, or be empty.
        to: "hf" (a folder for transformers), "native" (a checkpoint for single, ddp and fsdp) or "zero" (one for
            zero1, zero2 and zero3), the last two with the optimizer's state, where there is one, and for any world size.
        options: for other models and exports.
        export: for "hf".

    Returns:
        The directory that was written.

    Raises:
        ConfigError: `out` exists and is not empty, lies in `source`, or a directory cannot be renamed to it.
        CheckpointError: the checkpoint is damaged or cannot be converted, or `out` cannot be written.
    """
    from megatron_rdt.checkpoint import read_from_checkpoint

    target, plan = plan_conversion(source, out, to, options, export)
    make_parent(target, "OUT")  # at last: a source that leads nowhere leaves no directories
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")

    def write(checkpoint: Path) -> None:
        """Convert a checkpoint into an empty `temporary`."""
        shutil.rmtree(temporary, ignore_errors=True)  # also what a conversion that was killed has left
        temporary.mkdir()
        if to == "hf":
            from megatron_rdt.convert.hf_export import export_hf

            export_hf(checkpoint, temporary, export)
        else:
            from megatron_rdt.convert.training_state import convert_training_state

            convert_training_state(checkpoint, temporary, to)

    def write_all() -> None:
        """Fill `temporary` from whatever the source is."""
        shutil.rmtree(_name_scratch(temporary), ignore_errors=True)  # of an export that was killed
        if plan is None:
            read_from_checkpoint(source, write)
        else:
            _write_foreign(plan, temporary, write if to == "hf" else None)

    busy = f"another rdt convert is writing {target}. Wait for it, or choose another OUT."
    with hold_lock(target.with_name(f".{target.name}.lock"), busy):
        _publish(target, temporary, write_all, out)
    return target


def plan_conversion(
    source: str, out: str, to: str, options: "ImportOptions | None" = None, export: "ExportOptions | None" = None
) -> "tuple[Path, ImportPlan | None]":
    """Check the arguments of `convert`, which are these, and the source; return the path of `out`, and see `_plan_foreign`."""
    if export is not None:
        from megatron_rdt.convert.hf_weights import check_shard_size

        check_shard_size(export.shard_size)
    target = Path(os.path.abspath(resolve_output_directory(out, "OUT")))
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file. Choose another OUT.")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not empty. Choose another OUT or remove it.")
    _check_outside_source(target, source)
    check_can_be_renamed_to(target, "OUT")
    return target, _plan_foreign(source, to, options)  # at last, since to choose a cut the model is run


def _check_outside_source(target: Path, source: str) -> None:
    """Raise ConfigError if `target` lies in the source, or among the checkpoints of a source that is a run."""
    folder = Path(os.path.realpath(source))
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    if folder in Path(os.path.realpath(target)).parents:
        raise ConfigError(f"OUT {target} lies in {folder}, which is read. Choose a path outside of it.")


def _plan_foreign(source: str, to: str, options: "ImportOptions | None") -> "ImportPlan | None":
    """Plan the conversion of what is no checkpoint of a run; None for a checkpoint or a run.

    Raises:
        ConfigError: options are for the other case, or missing.
        CheckpointError: it does not exist, is of no known kind, has no equal here, or is damaged.
    """
    from megatron_rdt.checkpoint import MANIFEST, TRAINER_STATE, find_run_or_checkpoint
    from megatron_rdt.convert.recognize import ImportOptions, is_foreign, plan_import

    if not is_foreign(Path(source)):
        try:
            find_run_or_checkpoint(source)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} A folder with another project's model, or its file of weights (.safetensors, .pt, .pth, .bin), is "
                "taken too; nothing is downloaded, so name one on this machine."
            ) from None
        own = (MANIFEST, TRAINER_STATE, CHECKPOINTS, LATEST)
        if Path(source).is_dir() and not any(os.path.lexists(Path(source) / name) for name in own):
            raise CheckpointError(
                f"{source} holds no run, no checkpoint and no weights of another model (*.safetensors, *.bin, *.pt). Name the "
                "folder or file that does."
            )
        if options not in (None, ImportOptions()):
            raise ConfigError(f"--cut, --tokenizer and --config are for other projects' models; {source} is none.")
        return None
    if to == "zero":
        raise ConfigError(
            f"{source} has no optimizer state, and DeepSpeed resumes with one. Convert it --to native and begin a run of any "
            "engine with --init."
        )
    return plan_import(Path(source), options or ImportOptions())


def _write_foreign(plan: "ImportPlan", temporary: Path, export: Callable[[Path], None] | None) -> None:
    """Write another project's model into `temporary` as a checkpoint, or let `export` make that of the checkpoint.

    It prints what was found on the way.
    """
    from megatron_rdt.convert.import_checkpoint import import_checkpoint

    folder = temporary if export is None else _name_scratch(temporary)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # also what a conversion that was killed has left
        folder.mkdir()
        for note in import_checkpoint(plan, folder):
            print(f"{plan.kind}: {note}")
        if export is not None:
            export(folder)
    finally:
        if export is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _name_scratch(temporary: Path) -> Path:
    """Return the path of the checkpoint from which an export is made: fixed, so that the next conversion can remove it."""
    return temporary.with_name(f"{temporary.name}.native")  # no target's `temporary`, since those end with the suffix


def _publish(target: Path, temporary: Path, write: Callable[[], None], out: str) -> None:
    """Call `write`, which fills `temporary`, and rename that to `target` once it is durable; it is gone in any case.

    `out` is the user's word for the target, for messages.
    """
    try:
        write()
        _make_durable(temporary)
        check_locks()
        if target.exists():
            target.rmdir()
        temporary.rename(target)
        fsync_directory(target.parent)
    except RdtError:
        raise
    except Exception as error:  # every library that writes raises errors of its own
        reason, remedy, needs_room = explain_write_failure(error, target.parent)
        if find_write_error(error) is None and not needs_room:
            raise
        what = f"could not write {out}: {reason}; nothing was left behind"
        raise CheckpointError(f"{what}. {remedy} or choose another OUT.") from error
    finally:
        if not has_lost_lock():  # then it is the new holder's
            shutil.rmtree(temporary, ignore_errors=True)


def _make_durable(directory: Path) -> None:
    """Flush every file and then its directory to the disk, innermost directories first."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_file(os.path.join(folder, name))
        fsync_directory(folder)
