"""Publish stage: replace a corpus atomically, and guard the old one until then.

A corpus is built in the working directory `.NAME.prep` next to it. Publishing renames the old corpus to `.NAME.replaced`, the
new one to `NAME`, and then deletes what is left. A process that is killed in between leaves a state that
`recover_interrupted_publish` recognises, so one of the two corpora always survives, complete.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import (
    describe_changed_options,
    hash_code,
    hash_result_options,
    working_directory_path,
)
from data_prep.sources.inputs import COMPRESSED, Input, describe_changed_input, list_input_files
from data_prep.stages.scan_totals import EmptySplitError
from data_prep.stages.write_shards import TEXT_PER_TOKEN
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST, load_manifest
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import fsync_directory, hold_lock, is_disk_full, sha256_of

# Names in a corpus that --restart may delete; `packing` is written by `rdt prep pack` and by runs.
WRITTEN = {MANIFEST, "tokenizer", "train", "valid", "packing"}
COMPRESSION = 3  # estimated size of the text in a compressed file, in sizes of the file
LOCK_PATIENCE_S = 60.0
GIGA = 1e9


def lock_output(out: Path, patience_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold the lock of a corpus for the block; LaunchError if another process holds it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent} cannot be made: {error.strerror}. Choose another --out.") from None
    message = f"another `rdt prep` is writing {out}. Wait for it, or choose another --out."
    return hold_lock(out.with_name(f".{out.name}.lock"), message, patience_s)


def array_task_lock_path(root: Path, index: int) -> Path:
    """Return the path of the lock that array task `index` holds while it runs."""
    directory = root / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / str(index)


def check_no_array_task(out: Path, except_index: int = -1) -> None:
    """Raise LaunchError if an array task is running on `out`, other than the one excepted."""
    directory = working_directory_path(out) / "locks"
    for path in sorted(directory.glob("*")):
        if path.name != str(except_index):
            message = f"array task {path.name} of `rdt prep --shard` is running on {out}. Wait for it, or stop it."
            with hold_lock(path, message):
                pass


def recover_interrupted_publish(out: Path) -> None:
    """Restore a consistent state after a process that was killed while it published."""
    root, replaced = working_directory_path(out), _replaced_path(out)
    # The corpus has left the working directory: it was published, and only the deletion is missing.
    if (root / "groups").exists() and not (root / "corpus").exists():
        shutil.rmtree(root, ignore_errors=True)
    # The old corpus was renamed and the new one not yet: take the old one back.
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced_path(out: Path) -> Path:
    """Path of the old corpus while it is replaced."""
    return out.with_name(f".{out.name}.replaced")


def publish_corpus(out: Path) -> None:
    """Rename the finished corpus to `out`, replacing an old one, and remove the working directory."""
    root = working_directory_path(out)
    # A directory cannot be renamed onto one that is not empty, so the old corpus makes room first. Its content is
    # deleted only when the new name is durable on disk.
    if out.exists():
        out.rename(_replaced_path(out))
    (root / "corpus").rename(out)
    fsync_directory(out.parent)
    shutil.rmtree(_replaced_path(out), ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


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
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and was not written by `rdt prep`. Choose another --out.")
    if replace:
        foreign = sorted({path.name for path in out.iterdir()} - WRITTEN)
        if foreign:
            raise ConfigError(
                f"{out} holds {foreign[0]}, which `rdt prep` did not write and --restart would delete. Move it elsewhere."
            )
        return False
    manifest = load_manifest(out)
    difference = _describe_difference(out, config, manifest.document)
    if difference:
        raise ConfigError(f"{difference}. Use a new --out, or --restart true to replace it.")
    manifest.verify()
    return True


def _describe_difference(out: Path, config: PrepConfig, manifest: dict[str, Any]) -> str:
    """Return the first thing in which a corpus differs from what the options would make now, in words; "" if none."""
    before = manifest["prep"]
    if before["options_sha256"] != hash_result_options(config):
        changed = describe_changed_options(before["options"], config) or "another version of `rdt prep`"
        return f"{out} was prepared with {changed}"
    if before.get("code", {}).get("filters") != hash_code(config)["filters"]:
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
    """Raise DataError if the disk has no room for the shards and for the encoded parts that are not in one yet."""
    if config.max_documents:
        return
    vocab_size = Tokenizer(config.tokenizer).vocab_size if config.tokenizer else config.vocab_size
    itemsize = token_dtype(vocab_size).itemsize
    text = sum(file.bytes * (COMPRESSION if _is_compressed(file) else 1) for file in inputs)
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


def _directory_bytes(directory: Path) -> int:
    """Size of all files below a directory, while other tasks may add and remove some."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size


def _is_compressed(file: Input) -> bool:
    """Return True if the text in a file is larger than the file."""
    return file.path.lower().endswith((*COMPRESSED, ".parquet"))


@contextmanager
def explain_failure(out: Path, alone: bool) -> Iterator[None]:
    """Explain a full disk in the block, and remove a working directory without anything worth keeping.

    Args:
        out: directory of the corpus.
        alone: no array task may be running on it, so the working directory may be removed.

    Raises:
        DataError: the disk was full.
    """
    root = working_directory_path(out)
    is_useless = False
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DataError(
            f"the disk is full while writing {out}. Free space, and `rdt prep` continues where it stopped; what is done is "
            f"in {root}. Or set --out to another disk, and remove that directory."
        ) from error
    except EmptySplitError:
        is_useless = True
        raise
    finally:
        # A prep that failed before the first scan was complete, on a wrong option for instance, leaves no trace.
        if alone and root.exists() and (is_useless or not any((root / "scan").glob("part-*.json"))):
            shutil.rmtree(root, ignore_errors=True)
