"""Snapshot of code and config at submission, in the run directory, so that a job runs what was submitted.

Below `submitted/HASH` are the resolved config.yaml and, in code/, Python files and templates of the packages, and nothing else
of the checkout. The name is a hash of all of it, so the same submission twice is one snapshot.
"""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rdt.config import RunConfig, dump_config
from megatron_rdt.config.load import SAVED_CONFIG
from megatron_rdt.files import TEMPORARY_SUFFIX, write_text
from megatron_rdt.run_directory import run_directory_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_rdt", "data_prep", "launch")
ENDINGS = (".py", ".sbatch", ".typed")
SUBMITTED, CODE, SOURCE = "submitted", "code", "source.json"
HASH_DIGITS = 12


@dataclass(frozen=True)
class Snapshot:
    """Code and config that a job will run.

    Attributes:
        directory: where it is, or will be once it is written.
        config: text of the resolved config.
        files: of the packages, by path below the root of the code.
    """

    directory: Path
    config: str
    files: dict[str, bytes]

    def write(self) -> None:
        """Write the snapshot unless it is there; its directory gets its name when it is complete."""
        if self.directory.is_dir():
            return
        temporary = self.directory.with_name(f".{self.directory.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        try:
            for name, content in self.files.items():
                path = temporary / CODE / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            write_text(temporary / SAVED_CONFIG, self.config)
            write_text(temporary / SOURCE, json.dumps(describe_source(), indent=1) + "\n")
            temporary.rename(self.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_code() -> dict[str, bytes]:
    """Return the files of the packages, by path below the root."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*")))
    return {
        str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.suffix in ENDINGS and path.is_file()
    }


def make_snapshot(config: RunConfig, code: dict[str, bytes], directory: Path | None = None) -> Snapshot:
    """Return the snapshot of a submission, in the run's directory or in another one; nothing is written yet."""
    text, digest = dump_config(config), hashlib.sha256()
    for name, content in [(SAVED_CONFIG, text.encode()), *code.items()]:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return Snapshot((directory or run_directory_of(config)) / SUBMITTED / digest.hexdigest()[:HASH_DIGITS], text, code)


def describe_source() -> dict[str, Any]:
    """Return the commit of the code and the files of the packages that differ from it, where it is a git checkout."""
    command = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        words = [*command, "status", "--porcelain", "--", *PACKAGES]
        changed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None}
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}
