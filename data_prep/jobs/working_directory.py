"""The working directory of a prep: what is planned, and which steps are done.

A step writes its files, then a record that names them with their sizes; the record is renamed into place last, so a step
whose record fits its files is done, whoever did it and whenever. `plan.json` says what the records belong to.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.cleaning import Cleaner
from data_prep.config import PrepConfig
from data_prep.sources.inputs import Input, Part, cut_parts, input_files
from data_prep.stages.minhash import ALGORITHM
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import TEMPORARY_SUFFIX, sha256_of, write_text

PLAN = "plan.json"
VERSIONED = ("megatron-rdt", "sentencepiece", "datasets")
# Options that do not change what is written.
NOT_IN_RESULT = ("out", "workers", "shard", "restart")
# Options that may change while a prep is unfinished: what is done was done without them.
POLICY = ("on_bad", "max_bad")
# Options that matter from the tokenizer on.
LATE = ("tokenizer", "tokenizer_type", "vocab_size", "special_tokens", "tokenizer_sample_bytes", "shard_bytes")
TOKENIZER_RECORD = "tokenizer.json"


@dataclass(frozen=True)
class Job:
    """What every step needs; small enough to send to a process.

    Attributes:
        config: the options.
        root: the working directory.
        plan: identity of the plan that records belong to.
    """

    config: PrepConfig
    root: Path
    plan: str

    def path(self, *parts: str) -> Path:
        """A path in the working directory, the directory of which exists."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def corpus(self) -> Path:
        """What becomes `out` when it is complete."""
        return self.root / "corpus"

    def record(self, path: Path) -> dict[str, Any] | None:
        """The record at `path`, or None where there is none of this plan or its files are not as it says."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            sizes = {name: (self.root / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError):
            return None
        return record if record["plan"] == self.plan and sizes == record["files"] else None

    def write_record(self, path: Path, files: Iterable[Path], content: dict[str, Any]) -> None:
        """Say that a step is done: the last thing that it does."""
        sizes = {str(file.relative_to(self.root)): file.stat().st_size for file in files}
        write_text(path, json.dumps({"plan": self.plan, "files": sizes, **content}))


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        job: what steps need.
        inputs: files, in order.
        parts: pieces of the input, in order.
    """

    job: Job
    inputs: list[Input]
    parts: list[Part]


def options_of(config: PrepConfig) -> dict[str, Any]:
    """The options that decide the result."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IN_RESULT}


def options_hash(config: PrepConfig) -> str:
    """Hash of the options that decide the result."""
    return _hash(options_of(config))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def changed_options(before: dict[str, Any], config: PrepConfig, free: Iterable[str] = ()) -> str:
    """`seed=7, now 8; ...` for every option that differs but those in `free`; "" where none does."""
    now = options_of(config)
    keys = [key for key in now if key not in free and before.get(key, _default(key)) != now[key]]
    return "; ".join(f"{key}={before.get(key, _default(key))}, now {now[key]}" for key in keys)


@functools.cache
def _defaults() -> dict[str, Any]:
    return options_of(PrepConfig())


def _default(key: str) -> Any:
    return _defaults().get(key)


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def code_of(config: PrepConfig) -> dict[str, str]:
    """What decides the result beside options and texts: versions, the code of filters, the given tokenizer."""
    found = {**versions(), "filters": Cleaner(config).fingerprint}
    if config.dedup == "near":
        found["minhash"] = ALGORITHM
    if config.tokenizer:
        path = Path(config.tokenizer)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found["tokenizer"] = _hash([sha256_of(file) for file in files if file.is_file()])
    return found


def resume(config: PrepConfig, root: Path, alone: Callable[[], None]) -> Plan | str:
    """What an earlier call left in `root`, to go on with; or in words why there is nothing to go on with, "" for nothing there.

    Args:
        config: checked options.
        root: the working directory.
        alone: raises where another task is using the directory.

    Raises:
        ConfigError: what is there was begun with other options or versions, and `restart` is not set.
    """
    before = _read(root / PLAN)
    if before is None:
        return ""
    # What only the tokenizer and later steps depend on may change until there is a tokenizer.
    free = POLICY if (root / TOKENIZER_RECORD).exists() else (*POLICY, *LATE)
    code = code_of(config)
    difference = changed_options(before["options"], config, free) or _changed_code(before["code"], code, free)
    if difference and not config.restart:
        raise ConfigError(
            f"{root} holds an unfinished `rdt prep` that was begun with {difference}. Go on with what it was begun "
            "with, or set --restart true to begin again."
        )
    inputs = input_files(config)
    changed = difference or _changed_input(before["inputs"], inputs)
    if changed:
        return changed
    if before["options"] != options_of(config) or before["code"] != code:
        alone()
        write_text(root / PLAN, json.dumps(before | {"options": options_of(config), "code": code}))
    files = inputs + [Input(*values) for values in before["hub"]]
    parts = [
        Part(i, kind, tuple(files[first : first + count]), start, end, size)
        for i, (kind, first, count, start, end, size) in enumerate(before["parts"])
    ]
    return Plan(Job(config, root, before["id"]), inputs, parts)


def open_plan(config: PrepConfig, root: Path, alone: Callable[[], None]) -> Plan:
    """Go on with what an earlier call left in `root`, or begin; arguments and errors as for `resume`."""
    found = resume(config, root, alone)
    if isinstance(found, Plan):
        return found
    if found:
        print(f"{found}: beginning again")
    if root.exists():
        alone()
        shutil.rmtree(root)
    inputs = input_files(config)
    parts = cut_parts(config, inputs)
    places = {file.name: i for i, file in enumerate(inputs)}
    hub = [part.inputs[0] for part in parts if part.kind == "hub"]
    places |= {file.name: i for i, file in enumerate(hub, start=len(inputs))}
    document = {
        "options": options_of(config),
        "code": code_of(config),
        "inputs": [list(dataclasses.astuple(file)) for file in inputs],
        "hub": [list(dataclasses.astuple(file)) for file in hub],
        "parts": [[p.kind, places[p.inputs[0].name], len(p.inputs), p.start, p.end, p.size] for p in parts],
    }
    document["id"] = _hash(
        {
            **document,
            "options": {k: v for k, v in options_of(config).items() if k not in (*POLICY, *LATE)},
            "code": {k: v for k, v in code_of(config).items() if k not in LATE},
        }
    )
    root.mkdir(parents=True)
    write_text(root / PLAN, json.dumps(document))
    return Plan(Job(config, root, str(document["id"])), inputs, parts)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _changed_code(before: dict[str, str], now: dict[str, str], free: Iterable[str]) -> str:
    for name in sorted((before.keys() | now.keys()) - set(free)):
        if before.get(name) != now.get(name):
            versions = f"{before.get(name)}, now {now.get(name)}"
            return f"{name} {versions if name in VERSIONED else 'that have changed since'}"
    return ""


def _changed_input(before: list[list], inputs: list[Input]) -> str:
    """Which file is not as it was, in words, or ""."""
    recorded = {record.name: record for record in (Input(*values) for values in before)}
    now = {file.name: file for file in inputs}
    for name in sorted(now.keys() ^ recorded.keys()):
        return f"{name} was {'added' if name in now else 'removed'}"
    for name, file in now.items():
        if (file.bytes, file.mtime_ns) != (recorded[name].bytes, recorded[name].mtime_ns):
            return f"{name} has changed"
    return ""


def remove_temporary(root: Path) -> None:
    """Remove what processes that were killed were writing; nobody may be writing there."""
    for path in [*root.rglob(f"*{TEMPORARY_SUFFIX}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
