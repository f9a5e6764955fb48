"""The corpus that is there, and how the next one takes its place: never a moment without one or the other."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import changed_options, code_of, options_hash
from data_prep.sources.inputs import COMPRESSED, Input, input_files
from data_prep.stages.scan_totals import EmptySplitError
from data_prep.stages.write_shards import TEXT_PER_TOKEN
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST, load_manifest
from megatron_rdt.data.shard_files.indexed import token_dtype
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import fsync_directory, hold_lock, is_disk_full, sha256_of

WRITTEN = {MANIFEST, "tokenizer", "train", "valid", "packing"}  # the last by `rdt prep pack` and by runs
COMPRESSION = 3  # text in a compressed file is about so many times as large
LOCK_PATIENCE_S = 60.0
GIGA = 1e9


def working_directory(out: Path) -> Path:
    """Where the steps of a prep leave their files, until the corpus is complete."""
    return out.with_name(f".{out.name}.prep")


def lock(out: Path, patience_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold the lock of a corpus; LaunchError where another process has it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent} cannot be made: {error.strerror}. Choose another --out.") from None
    message = f"another `rdt prep` is writing {out}. Wait for it, or choose another --out."
    return hold_lock(out.with_name(f".{out.name}.lock"), message, patience_s)


def task_lock(root: Path, task: int) -> Path:
    """Lock file of a task of several."""
    directory = root / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / str(task)


def check_alone(out: Path, but: int = -1) -> None:
    """LaunchError where a task of several is at work beside `out`, other than the task `but`."""
    directory = working_directory(out) / "locks"
    for path in sorted(directory.glob("*")):
        if path.name != str(but):
            message = f"task {path.name} of a prep with --shard is at work on {out}. Wait for it, or end it."
            with hold_lock(path, message):
                pass


def mend(out: Path) -> None:
    """Clear up after a process that was killed while it published.

    Where the old corpus is hidden and the new one not there, the old one gets its name back; a working directory whose
    corpus has its name is removed.
    """
    root, replaced = working_directory(out), _replaced(out)
    if (root / "groups").exists() and not (root / "corpus").exists():
        shutil.rmtree(root, ignore_errors=True)
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def publish(out: Path) -> None:
    """Give the finished corpus its name, in the place of an old one, and remove the working directory."""
    root = working_directory(out)
    if out.exists():
        out.rename(_replaced(out))
    (root / "corpus").rename(out)
    fsync_directory(out.parent)
    shutil.rmtree(_replaced(out), ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


def already_there(out: Path, config: PrepConfig, replace: bool) -> bool:
    """Whether `out` is complete, and made with these options from these files.

    Args:
        out: the directory.
        config: the options.
        replace: the corpus is to be replaced, whatever it was made with.

    Raises:
        ConfigError: something else is there; with `replace`, something that would be deleted.
        DataError: it is damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and was not written by `rdt prep`. Choose another --out.")
    if replace:
        foreign = sorted({path.name for path in out.iterdir()} - WRITTEN)
        if foreign:
            raise ConfigError(
                f"{out} holds {foreign[0]}, which `rdt prep` did not write and --restart would delete. Move it away."
            )
        return False
    manifest = load_manifest(out)
    before = manifest.document["prep"]
    if before["options_sha256"] != options_hash(config):
        changed = changed_options(before["options"], config) or "another version of `rdt prep`"
        raise ConfigError(f"{out} was prepared with {changed}. Use a new --out, or --restart true to replace it.")
    if before.get("code", {}).get("filters") != code_of(config)["filters"]:
        raise ConfigError(
            f"{out} was prepared with other code of the --filters. Use a new --out, or --restart true to replace it."
        )
    if config.tokenizer and Tokenizer(config.tokenizer).fingerprint != manifest.document["tokenizer"]["fingerprint"]:
        raise ConfigError(
            f"{out} was prepared with another tokenizer than {config.tokenizer} is now. Use a new --out, or --restart true "
            "to replace it."
        )
    difference = _changed_input(manifest.document["inputs"], config)
    if difference is not None:
        raise ConfigError(
            f"the text has changed since {out} was prepared: {difference}. Use a new --out, or --restart true to "
            "replace it."
        )
    manifest.verify()
    return True


def _changed_input(before: list[dict], config: PrepConfig) -> str | None:
    """The first file that differs from the manifest's; one that was only touched does not."""
    now, recorded = {file.name: file for file in input_files(config)}, {record["path"]: record for record in before}
    for name in sorted(now.keys() ^ recorded.keys()):
        return f"{name} was {'added' if name in now else 'removed'}"
    for name, file in now.items():
        record = recorded[name]
        if file.bytes == record["bytes"] and file.mtime_ns == record["mtime_ns"]:
            continue
        if file.bytes != record["bytes"] or sha256_of(file.path) != record["sha256"]:
            return f"{name} has other content"
    return None


def check_space(out: Path, config: PrepConfig, inputs: list[Input]) -> None:
    """DataError where the disk has not room for the tokens, and for what is encoded and not yet in its place."""
    if config.max_documents:
        return
    vocab_size = Tokenizer(config.tokenizer).vocab_size if config.tokenizer else config.vocab_size
    itemsize = token_dtype(vocab_size).itemsize
    text = sum(file.bytes * (COMPRESSION if _is_compressed(file) else 1) for file in inputs)
    tokens = text // TEXT_PER_TOKEN
    needed = tokens * (itemsize + bool(config.prompt_field)) + min(tokens * itemsize, 2 * config.shard_bytes)
    there = _bytes_below(working_directory(out))
    free = shutil.disk_usage(out.parent).free
    if free + there < needed:
        raise DataError(
            f"{out.parent} has {free / GIGA:,.2f} GB free, and about {(needed - there) / GIGA:,.2f} GB are needed for "
            f"{text / GIGA:,.2f} GB of text. Free space, or set --out to another disk."
        )


def _bytes_below(directory: Path) -> int:
    """Size of all files below a directory, in which other tasks may make and remove some meanwhile."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size


def _is_compressed(file: Input) -> bool:
    return file.path.lower().endswith((*COMPRESSED, ".parquet"))


@contextmanager
def explained(out: Path, alone: bool) -> Iterator[None]:
    """Say what a full disk means, and leave nothing where nothing is of value.

    Args:
        out: the directory of the corpus.
        alone: no other task is at work on it.

    Raises:
        DataError: the disk was full.
    """
    root = working_directory(out)
    useless = False
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DataError(
            f"the disk is full while writing {out}. Free space, and `rdt prep` goes on where it was; what is done lies in "
            f"{root}. Or set --out to another disk, and remove that directory."
        ) from error
    except EmptySplitError:
        useless = True
        raise
    finally:
        if alone and root.exists() and (useless or not any((root / "scan").glob("part-*.json"))):
            shutil.rmtree(root, ignore_errors=True)
