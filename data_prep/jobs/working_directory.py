"""The working directory of a prep: the input that it was begun with, and which of its steps are done.

A step writes its files, then a record that lists them with their sizes. The record is renamed into place last, so a step is
done if its record fits its files, whichever process did it and when. `plan.json` describes the options and the input that
the records belong to.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.cleaning import Cleaner
from data_prep.config import PrepConfig
from data_prep.sources.inputs import Input, Part, SourceListing, cut_parts, describe_changed_input, list_sources
from data_prep.sources.prep_output import DESCRIPTION
from data_prep.stages.minhash import ALGORITHM
from megatron_rdt.data.tokenizer.tokenizer_files import list_tokenizer_files
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import TEMPORARY_SUFFIX, sha256_of, write_text
from megatron_rdt.locks import check_locks

TOKENIZER_RECORD = "tokenizer.json"
VERSIONED = ("megatron-rdt", "sentencepiece", "datasets")
# Options that do not change the result.
NOT_IN_RESULT = ("out", "workers", "scheduler", "dashboard", "restart")
# Options that may change while a prep is unfinished, for the steps that are not done yet.
CHANGEABLE = ("on_bad", "max_bad")
# Options that only the tokenizer and later steps depend on.
FROM_TOKENIZER_ON = (
    "tokenizer",
    "tokenizer_type",
    "vocab_size",
    "special_tokens",
    "tokenizer_sample_bytes",
    "shard_bytes",
)


@dataclass(frozen=True)
class Job:
    """The options and paths that every step needs; small enough to send to a process.

    Attributes:
        config: the options.
        root: the working directory.
        identity: hash of what the steps before the tokenizer depend on; records of another one do not count.
    """

    config: PrepConfig
    root: Path
    identity: str

    def path(self, *parts: str) -> Path:
        """Return a path in the working directory, and make the folder that it lies in."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def temporary_directory(self, name: str) -> Path:
        """Return the path, not made here, of a directory that only this process writes, for `install_directory`."""
        return self.path(f"{name}-{os.uname().nodename}-{os.getpid()}{TEMPORARY_SUFFIX}")

    @property
    def corpus(self) -> Path:
        """The directory that becomes `out` when it is complete."""
        return self.root / "corpus"

    def read_record(self, path: Path) -> dict[str, Any] | None:
        """Read a step's record; None if there is none, it belongs to another job, or the sizes of its files differ."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            sizes = {name: (self.root / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError):
            return None
        return record if record["plan"] == self.identity and sizes == record["files"] else None

    def is_done(self, path: Path) -> bool:
        """Return True if the step with this record is done."""
        return self.read_record(path) is not None

    def write_record(self, path: Path, files: Iterable[Path], content: dict[str, Any]) -> None:
        """Write a step's record, its content with the sizes of its files, which marks the step as done."""
        sizes = {str(file.relative_to(self.root)): file.stat().st_size for file in files}
        write_text(path, json.dumps({"plan": self.identity, "files": sizes, **content}))


@dataclass(frozen=True)
class WorkingDirectory:
    """An open working directory: the job and the input that it works on.

    Attributes:
        job: what steps need.
        listing: the files of the sources, and what is not read.
        parts: pieces of the input, in order.
    """

    job: Job
    listing: SourceListing
    parts: list[Part]

    @property
    def inputs(self) -> list[Input]:
        """Files of the sources in order; shards of datasets are only in `parts`."""
        return self.listing.files


def working_directory_path(out: Path) -> Path:
    """Return the path of the working directory of the prep that writes `out`."""
    return out.with_name(f".{out.name}.prep")


def result_options(config: PrepConfig) -> dict[str, Any]:
    """Return the options that the result depends on."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IN_RESULT}


def hash_result_options(config: PrepConfig) -> str:
    """Return a hash of the options that the result depends on."""
    return _hash_json(result_options(config))


def _hash_json(value: Any) -> str:
    """Return the SHA-256, in hex, of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe_changed_options(before: dict[str, Any], config: PrepConfig, free: Iterable[str] = ()) -> str:
    """Return `seed=7, now 8; ...` for the options that differ, except those in `free`; "" if none does."""
    now = result_options(config)
    changed = [key for key in now if key in before and key not in free and before[key] != now[key]]
    return "; ".join(f"{key}={before[key]}, now {now[key]}" for key in changed)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the result depends on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def hash_code(config: PrepConfig) -> dict[str, str]:
    """Return the versions and hashes that the result depends on, by name: packages, code of the filters, given tokenizer."""
    found = {**installed_versions(), "filters": Cleaner(config).fingerprint}
    if config.dedup == "near":
        found["minhash"] = ALGORITHM
    if config.tokenizer:
        found["tokenizer"] = _hash_json([sha256_of(file) for file in list_tokenizer_files(config.tokenizer)])
    return found


def resume_working_directory(
    config: PrepConfig, root: Path, check_inputs: Callable[[list[Input]], None]
) -> tuple[WorkingDirectory | None, str]:
    """Return an earlier run's working directory and "", or None and why it is unusable; may update `plan.json`.

    Args:
        config: checked options.
        root: the working directory.
        check_inputs: raises if the job cannot be done with these files; called before anything is changed.

    Returns:
        The working directory, or None with the reason why it cannot be continued: `a.jsonl has changed`; "" if there is none.

    Raises:
        ConfigError: it was begun with other options or versions, and `restart` is not set.
    """
    before = _read_description(root)
    if before is None:
        return None, ""
    # Options of the tokenizer and later steps may change until there is a tokenizer.
    free = CHANGEABLE if (root / TOKENIZER_RECORD).exists() else (*CHANGEABLE, *FROM_TOKENIZER_ON)
    code = hash_code(config)
    difference = describe_changed_options(before["options"], config, free)
    difference = difference or _describe_changed_code(before["code"], code, free)
    if difference and not config.restart:
        raise ConfigError(
            f"{root} holds an unfinished `rdt prep` that was begun with {difference}. Continue with the options that it was "
            "begun with, or set --restart true to begin again; it stays as it is until then."
        )
    listing = list_sources(config)
    recorded = {record.name: record for record in (Input(*values) for values in before["inputs"])}
    changed = difference or describe_changed_input(recorded, listing.files, _has_other_size_or_time)
    if changed:
        return None, changed
    check_inputs(listing.files)
    if before["options"] != result_options(config) or before["code"] != code:
        write_text(root / DESCRIPTION, json.dumps(before | {"options": result_options(config), "code": code}))
    # Parts refer to their files by number. Shards of datasets are numbered after the files.
    files = listing.files + [Input(*values) for values in before["hub"]]
    parts = [
        Part(i, kind, tuple(files[first : first + count]), start, end, size)
        for i, (kind, first, count, start, end, size) in enumerate(before["parts"])
    ]
    return WorkingDirectory(Job(config, root, before["id"]), listing, parts), ""


def open_working_directory(
    config: PrepConfig, root: Path, check_inputs: Callable[[list[Input]], None]
) -> WorkingDirectory:
    """Continue as `resume_working_directory` does, or delete what is there, print why, and make a new directory.

    What an earlier run did is removed only when all has been read and checked that the new job begins with.
    """
    work, reason = resume_working_directory(config, root, check_inputs)
    if work is not None:
        return work
    listing = list_sources(config)
    parts = cut_parts(config, listing.files)
    document = _make_description(config, listing.files, parts)
    check_inputs(listing.files)
    check_locks()
    if reason:
        print(f"{reason}: beginning again")
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    try:
        write_text(root / DESCRIPTION, json.dumps(document))
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return WorkingDirectory(Job(config, root, str(document["id"])), listing, parts)


def _make_description(config: PrepConfig, inputs: list[Input], parts: list[Part]) -> dict[str, Any]:
    """Return the content of a new `plan.json`."""
    numbers = {file.name: i for i, file in enumerate(inputs)}
    hub = [part.inputs[0] for part in parts if part.kind == "hub"]
    numbers |= {file.name: i for i, file in enumerate(hub, start=len(inputs))}
    options, code = result_options(config), hash_code(config)
    document = {
        "options": options,
        "code": code,
        "inputs": [list(dataclasses.astuple(file)) for file in inputs],
        "hub": [list(dataclasses.astuple(file)) for file in hub],
        "parts": [[p.kind, numbers[p.inputs[0].name], len(p.inputs), p.start, p.end, p.size] for p in parts],
    }
    # Options that may change later have no part in the identity, so that the records of earlier steps stay valid.
    changeable = (*CHANGEABLE, *FROM_TOKENIZER_ON)
    lasting = {
        "options": {key: value for key, value in options.items() if key not in changeable},
        "code": {key: value for key, value in code.items() if key not in FROM_TOKENIZER_ON},
    }
    return {**document, "id": _hash_json({**document, **lasting})}


def _read_description(root: Path) -> dict[str, Any] | None:
    """Return the content of `plan.json`; None if there is none, or, with a printed line, if it is damaged.

    Raises:
        DataError: it cannot be read; what it describes may be intact.
    """
    path = root / DESCRIPTION
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Make it readable, or remove {root}.") from None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        print(f"{path} is damaged, so what {root} holds cannot be used: beginning again")
        return None
    return document


def _describe_changed_code(before: dict[str, str], now: dict[str, str], free: Iterable[str]) -> str:
    """Return the first version or hash of `hash_code` that differs, except those in `free`, in words; "" if none does."""
    for name in sorted((before.keys() | now.keys()) - set(free)):
        if before.get(name) != now.get(name):
            versions = f"{before.get(name)}, now {now.get(name)}"
            return f"{name} {versions if name in VERSIONED else 'that have changed since'}"
    return ""


def _has_other_size_or_time(file: Input, recorded: Input) -> bool:
    """Return True if a file's size or modification time differs from the recorded one."""
    return (file.bytes, file.mtime_ns) != (recorded.bytes, recorded.mtime_ns)


def install_directory(directory: Path, final: Path) -> None:
    """Rename a finished directory to `final`, replacing other content; delete it if the same files are there.

    A worker that was given up for lost may make the same directory at the same time; the first to finish gives it its name.
    A later one must leave it alone, since other steps may be reading it. Other content is damaged, or was left by a prep that
    ended before it wrote the record and was continued with other options: it is replaced.
    """
    try:
        directory.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        if _has_same_files(directory, final):
            shutil.rmtree(directory)
        else:
            shutil.rmtree(final)
            directory.rename(final)


def _has_same_files(one: Path, other: Path) -> bool:
    """Return True if two directories hold files of the same names and contents."""
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        sha256_of(one / name) == sha256_of(other / name) for name in names
    )


def remove_temporary_files(root: Path) -> None:
    """Remove the unfinished files of processes that were killed; no process may be writing below `root`."""
    for path in [*root.rglob(f"*{TEMPORARY_SUFFIX}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
