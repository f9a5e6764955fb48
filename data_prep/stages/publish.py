"""Publish stage: replace a corpus atomically, and guard the old one until then.

A corpus is built in the working directory `.NAME.prep` next to it. Publishing renames the old corpus to `.NAME.replaced`, the
new one to `NAME`, and then deletes what is left under the name `.NAME.deleted`. A process that is killed in between leaves a
state that `recover_interrupted_publish` recognises, so one of the two corpora always survives, complete.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.cleaning import Cleaner
from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import (
    describe_changed_options,
    hash_result_options,
    working_directory_path,
)
from data_prep.sources.inputs import COMPRESSED, Input, describe_changed_input, list_input_files
from data_prep.stages.repeated_text import SameTextError
from data_prep.stages.scan_totals import EmptySplitError
from data_prep.stages.write_shards import TEXT_PER_TOKEN
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST, load_manifest
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.tokenizer_files import TOKENIZER_FILES
from megatron_rdt.errors import ConfigError, DataError, LockLostError, RdtError
from megatron_rdt.files import explain_write_failure, find_write_error, fsync_directory, sha256_of
from megatron_rdt.locks import has_lost_lock, hold_lock
from megatron_rdt.output_paths import check_can_be_renamed_to, is_mount_point, make_parent

# Files in a corpus that --restart may delete; those in `packing` are written by `rdt prep pack` and by runs.
_TOKENIZER = "|".join(map(re.escape, TOKENIZER_FILES))
WRITTEN = re.compile(
    rf"{re.escape(MANIFEST)}|tokenizer/({_TOKENIZER})|(train|valid)/shard-[0-9-]+\.(bin|idx|mask|labels|examples|sum)|packing/.*"
)
COMPRESSION = 3  # estimated size of the text in a compressed file, in sizes of the file
GIGA = 1e9
MOST_FILES = 200_000  # parts, or shards, that a job may have; a part alone takes about ten milliseconds


def lock_output(out: Path) -> AbstractContextManager[None]:
    """Make the parent of `out`, and hold its lock for the block; LaunchError if another process has it."""
    make_parent(out)
    message = f"another `rdt prep` is writing {out}. Wait for it, or choose another --out."
    return hold_lock(out.with_name(f".{out.name}.lock"), message)


def recover_interrupted_publish(out: Path) -> None:
    """Finish or undo what a killed process left half published: delete leftovers, or rename the old corpus back.

    Raises:
        ConfigError: the old corpus cannot return to its name, because something else has it.
    """
    root, replaced = working_directory_path(out), _replaced_path(out)
    shutil.rmtree(_deleted_path(out), ignore_errors=True)
    # The corpus has left the working directory: it was published, and only the deletion is missing.
    if (root / "groups").exists() and not (root / "corpus").exists():
        _delete_directory(root, out)
    if not replaced.exists():
        return
    # The old corpus was renamed. It is deleted only if the new one has its name, and otherwise taken back.
    if (out / MANIFEST).is_file():
        _delete_directory(replaced, out)
    elif not out.exists() or (_is_empty(out) and not is_mount_point(out)):
        replaced.rename(out)
    else:
        raise ConfigError(
            f"{replaced} is the corpus that a `rdt prep` which was interrupted meant to replace, and {out} is something "
            "else. Move one of them elsewhere."
        )


def check_output(out: Path) -> None:
    """Raise ConfigError if a finished corpus could not be renamed to `out`, or the old one out of its way.

    Raises:
        ConfigError: it cannot; the message says what to do.
    """
    check_can_be_renamed_to(out)
    root = working_directory_path(out)
    if root.is_symlink() or is_mount_point(root):
        raise ConfigError(
            f"{root}, where the corpus is put together, is a link or a mount point, so the corpus could not be renamed to "
            f"{out}. Remove that, and set --out to the disk that has the space."
        )
    for path in (_replaced_path(out), _deleted_path(out)):
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} is left from a corpus that was replaced, and cannot be deleted. Delete it.")


def _replaced_path(out: Path) -> Path:
    """Path of the old corpus while it is replaced."""
    return out.with_name(f".{out.name}.replaced")


def _deleted_path(out: Path) -> Path:
    """Path of a directory that is being deleted: under no name by which it could be taken for complete."""
    return out.with_name(f".{out.name}.deleted")


def _is_empty(directory: Path) -> bool:
    """Return True if a path is a directory without entries."""
    return directory.is_dir() and not any(directory.iterdir())


def _delete_directory(directory: Path, out: Path) -> None:
    """Delete the working directory or the old corpus of `out`; if that fails, print why and what is left."""
    doomed = _deleted_path(out)
    try:
        directory.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        print(f"{doomed if doomed.exists() else directory} cannot be deleted: {error.strerror}. Delete it.")


def publish_corpus(out: Path) -> None:
    """Rename the finished corpus to `out`, replacing an old one, and remove the working directory.

    Raises:
        DataError: the file system refuses a rename; the old corpus is where it was, and the new one is kept.
    """
    root, replaced = working_directory_path(out), _replaced_path(out)
    try:
        # A directory cannot be renamed onto one that is not empty, so the old corpus makes room first. Its content is
        # deleted only when the new name is durable on disk.
        if out.exists():
            out.rename(replaced)
        (root / "corpus").rename(out)
    except OSError as error:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise DataError(
            f"the corpus is complete in {root / 'corpus'}, but cannot be renamed to {out}: {error.strerror}. Move what is "
            "there elsewhere, or make its folder writable, and run the same command again: only the rename is left."
        ) from error
    fsync_directory(out.parent)
    if replaced.exists():
        _delete_directory(replaced, out)
    _delete_directory(root, out)


def is_already_prepared(out: Path, config: PrepConfig, replace: bool) -> bool:
    """Return True if `out` is complete and was made with these options from these files; False if it is to be written.

    Args:
        out: directory of the corpus.
        config: the options.
        replace: replace a corpus that exists, whatever it was made with.

    Raises:
        ConfigError: `out` holds something else; with `replace`, something that would be deleted.
        DataError: the corpus is damaged.
    """
    if not out.exists() or _is_empty(out):
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and was not written by `rdt prep`. Choose another --out.")
    if replace:
        if foreign := _find_foreign_file(out):
            raise ConfigError(
                f"{out} holds {foreign}, which `rdt prep` did not write and --restart would delete. Move it elsewhere."
            )
        return False
    manifest = load_manifest(out)
    difference = _describe_difference(out, config, manifest.document)
    if difference:
        raise ConfigError(f"{difference}. Use a new --out, or --restart true to replace it.")
    manifest.verify()
    return True


def _find_foreign_file(out: Path) -> str:
    """Return the path within a corpus of the first file that neither prep nor a run wrote there; "" if there is none."""
    for path in sorted(out.rglob("*")):
        inside = path.relative_to(out).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not WRITTEN.fullmatch(inside):
            return inside
    return ""


def _describe_difference(out: Path, config: PrepConfig, manifest: dict[str, Any]) -> str:
    """Return the first thing in which a corpus differs from what the options would make now, in words; "" if none."""
    before = manifest["prep"]
    if before["options_sha256"] != hash_result_options(config):
        changed = describe_changed_options(before["options"], config) or "another version of `rdt prep`"
        return f"{out} was prepared with {changed}"
    if before.get("code", {}).get("filters") != Cleaner(config).fingerprint:
        return f"{out} was prepared with other code of the --filters"
    if config.tokenizer and Tokenizer(config.tokenizer).fingerprint != manifest["tokenizer"]["fingerprint"]:
        return f"{out} was prepared with another tokenizer than {config.tokenizer} is now"
    recorded = {record["path"]: record for record in manifest["inputs"]}
    changed = describe_changed_input(recorded, list_input_files(config), _has_other_content)
    return f"the text has changed since {out} was prepared: {changed}" if changed else ""


def _has_other_content(file: Input, recorded: dict[str, Any]) -> bool:
    """Return True if a file differs from its record in a manifest; one that was only touched does not."""
    if file.bytes != recorded["bytes"]:
        return True
    return file.mtime_ns != recorded["mtime_ns"] and sha256_of(file.path) != recorded["sha256"]


def check_disk_space(out: Path, config: PrepConfig, inputs: list[Input]) -> None:
    """Raise DataError if the disk lacks room for shards and encoded parts; not checked with `max_documents`."""
    if config.max_documents:
        return
    text, itemsize = _estimate_text_bytes(inputs), _token_bytes(config)
    tokens = text // TEXT_PER_TOKEN
    # With prompts a mask of one byte per token. Encoded parts are removed with each group: about two shards' worth.
    needed = tokens * (itemsize + bool(config.prompt_field)) + min(tokens * itemsize, 2 * config.shard_bytes)
    written = _directory_bytes(working_directory_path(out))
    free = shutil.disk_usage(out.parent).free
    if free + written < needed:
        raise DataError(
            f"{out.parent} has {free / GIGA:,.2f} GB free, and about {(needed - written) / GIGA:,.2f} GB are needed for "
            f"{text / GIGA:,.2f} GB of text. Free space, or set --out to another disk."
        )


def check_file_counts(config: PrepConfig, inputs: list[Input]) -> None:
    """Raise ConfigError if the input makes over MOST_FILES parts or shards; not checked with `max_documents`."""
    if config.max_documents:
        return
    cut = sum(file.bytes for file in inputs if not file.path.lower().endswith(COMPRESSED))
    written = _estimate_text_bytes(inputs) // TEXT_PER_TOKEN * _token_bytes(config)
    for name, size, files in (("part_bytes", cut, "parts"), ("shard_bytes", written, "shards")):
        value = getattr(config, name)
        if value and size // value > MOST_FILES:
            raise ConfigError(
                f"{name} is {value:,}: the input would become about {size // value:,} {files}, each of them several files. "
                f"Set --{name} to {-(-size // MOST_FILES):,} or more."
            )


def _token_bytes(config: PrepConfig) -> int:
    """Bytes of a token in the shards."""
    return token_dtype(Tokenizer(config.tokenizer).vocab_size if config.tokenizer else config.vocab_size).itemsize


def _estimate_text_bytes(inputs: list[Input]) -> int:
    """Estimate the bytes of text in files, some of which may be compressed."""
    return sum(file.bytes * (COMPRESSION if _is_compressed(file) else 1) for file in inputs)


def _directory_bytes(directory: Path) -> int:
    """Size of all files below a directory, while somebody may add and remove some."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size


def _is_compressed(file: Input) -> bool:
    """Return True if a file is named .gz, .zst or .parquet, so that its text is larger than the file."""
    return file.path.lower().endswith((*COMPRESSED, ".parquet"))


@contextmanager
def explain_failure(out: Path) -> Iterator[None]:
    """Add to the block's errors what is kept, explain a failed write, and remove a useless working directory.

    Raises:
        DataError: the disk was full, for example.
    """
    root = working_directory_path(out)
    is_useless = False
    try:
        yield
    except OSError as error:
        if find_write_error(error) is None:
            raise
        reason, remedy, _ = explain_write_failure(error, out.parent)
        raise DataError(
            f"{reason} while writing {out}. {remedy}, and `rdt prep` continues where it stopped; what is done is in {root}. "
            "Or set --out to another disk, and remove that directory."
        ) from error
    except LockLostError:
        raise
    except (EmptySplitError, SameTextError):
        is_useless = True
        raise
    except RdtError as error:
        if _has_finished_scan(root) and str(root) not in str(error):
            error.args = (
                f"{error} What is done is kept in {root}: the same command continues there, or begins again if the text "
                "has changed.",
            )
        raise
    finally:
        # A prep that failed before the first scan was complete, on a wrong option for instance, leaves no trace.
        if root.exists() and not has_lost_lock() and (is_useless or not _has_finished_scan(root)):
            shutil.rmtree(root, ignore_errors=True)


def _has_finished_scan(root: Path) -> bool:
    """Return True if a working directory holds the scan of a part."""
    return any((root / "scan").glob("part-*.json"))
