"""Prep with random corpora, options, numbers of machines and kills always writes the bytes of an undisturbed run.

A case prepares the same text twice: once in this process, and once by array tasks in processes that are killed at random
points of their writing (SIGKILL, before or after a file is renamed), as often as the case says, and started again.
RDT_FUZZ_CASES sets the number of cases.
"""

import dataclasses
import functools
import hashlib
import json
import os
import random
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import PrepConfig
from data_prep.jobs import leases, step_runner
from data_prep.pipeline import merge, prepare
from megatron_rdt.data.shard_files.corpus_manifest import load_manifest

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("RDT_FUZZ_CASES", "12"))
WORDS = [
    "the loop",
    "runs",
    "again",
    "state h",
    "e",
    "0",
    "17",
    "4096",
    "\t",
    "\n\n",
    "",
    "naïve",
    "🌀",
    "\u2028",
    "if x:",
]
MEMORY = "/dev/shm"  # thousands of files that are synchronised to a disk take minutes; to memory, seconds


@dataclass(frozen=True)
class Case:
    """A corpus, the options, and the disturbances.

    Attributes:
        seed: of the text.
        files: documents in each file.
        compressed: whether each file is a .jsonl.zst.
        repeats: share of documents that repeat an earlier one.
        options: of prep.
        machines: number of array tasks that share the job; 0 is a run without --shard.
        together: whether the array tasks run at the same time.
        kills: for each process in turn, the rename at which it dies and whether before it; further processes run to the end.
    """

    seed: int
    files: tuple[int, ...]
    compressed: tuple[bool, ...]
    repeats: float
    options: dict[str, object]
    machines: int
    together: bool
    kills: tuple[tuple[int, bool], ...]


OPTIONS = st.fixed_dictionaries(
    {
        "dedup": st.sampled_from(["none", "exact", "near"]),
        "normalize": st.sampled_from(["none", "NFKC"]),
        "min_chars": st.sampled_from([0, 30]),
        "max_documents": st.sampled_from([0, 0, 0, 25]),
        "valid_fraction": st.sampled_from([0.0, 0.3]),
        "shard_bytes": st.sampled_from([200, 2_000, 1 << 20]),
        "part_bytes": st.sampled_from([300, 3_000, 0]),
        "prompt_field": st.sampled_from(["", "prompt"]),
        "seed": st.integers(0, 3),
    }
)
CASES_OF_PREP = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    files=st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple),
    compressed=st.lists(st.booleans(), min_size=4, max_size=4).map(tuple),
    repeats=st.sampled_from([0.0, 0.2, 0.7]),
    options=OPTIONS,
    machines=st.integers(0, 4),
    together=st.booleans(),
    kills=st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=4).map(tuple),
)


def write_source(folder: Path, case: Case) -> None:
    """Write the JSON-lines files of a case."""
    import zstandard

    draw, earlier = random.Random(case.seed), list[str]()
    for index, count in enumerate(case.files):
        lines = []
        for _ in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 40, 150])))
            text = draw.choice(earlier) if earlier and draw.random() < case.repeats else text
            earlier.append(text)
            lines.append(json.dumps({"text": text, "prompt": draw.choice(["", "Q: 1 + 1 = "])}) + "\n")
        content = "".join(lines).encode()
        if case.compressed[index]:
            (folder / f"{index}.jsonl.zst").write_bytes(zstandard.compress(content))
        else:
            (folder / f"{index}.jsonl").write_bytes(content)


def start_process(job: Callable[[], object], kill: tuple[int, bool] | None) -> int:
    """Start a process that does the job and is killed at the rename that `kill` names; return its id."""
    child = os.fork()
    if child:
        return child
    count, replace = 0, os.replace

    def replace_or_die(source: object, target: object, **folders: object) -> None:
        nonlocal count
        count += 1
        if kill == (count, True):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **folders)  # type: ignore[arg-type]
        if kill == (count, False):
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        os.replace = os.rename = replace_or_die  # type: ignore[assignment]
        job()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def run_until_done(jobs: list[Callable[[], object]], kills: list[tuple[int, bool]]) -> None:
    """Run all jobs at the same time, and again those that were killed, until all have succeeded."""
    while jobs:
        children = [(start_process(job, kills.pop() if kills else None), job) for job in jobs]
        states = [(os.waitpid(child, 0)[1], job) for child, job in children]
        assert all(os.WIFSIGNALED(status) or status == 0 for status, _ in states), "prep should have gone on"
        jobs = [job for status, job in states if os.WIFSIGNALED(status)]


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Array tasks look at each other often, and soon take over the leases of a dead one."""
    monkeypatch.setattr(leases, "EXPIRE_S", 0.5)
    monkeypatch.setattr(leases, "RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(step_runner, "LOOK_AT_OTHERS_EVERY_S", 0.02)
    monkeypatch.setattr(step_runner, "POLL_S", 0.02)


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by relative path; of the manifest without the option `out`."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            document = json.loads(content)
            document["prep"]["options"].pop("out", None)
            content = json.dumps(document, sort_keys=True).encode()
        found[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return found


def error_name(job: Callable[[], object]) -> str:
    """Name of the error of a job that cannot be done, because of an empty split for instance; "" if it succeeds."""
    from megatron_rdt.errors import RdtError

    try:
        job()
    except RdtError as error:
        return type(error).__name__
    return ""


@pytest.mark.distributed
@pytest.mark.timeout(10 * CASES + 60)
@pytest.mark.usefixtures("short_waits")
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100)
@given(case=CASES_OF_PREP)
def test_kills_and_machines_change_nothing(case: Case, tiny_corpus: Path) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        write_source(text, case)
        base = PrepConfig(sources=[str(text)], tokenizer=str(tiny_corpus / "tokenizer"), workers=1, **case.options)  # type: ignore[arg-type]
        plain = dataclasses.replace(base, out=str(folder / "plain"))
        split = dataclasses.replace(base, out=str(folder / "split"))
        refused = error_name(lambda: prepare(plain))
        if refused:
            return
        tasks = [dataclasses.replace(split, shard=f"{i}/{case.machines}") for i in range(case.machines)]
        shares: list[Callable[[], object]] = [functools.partial(prepare, task) for task in tasks]
        kills = list(case.kills)
        for jobs in [shares] if case.together else [[share] for share in shares]:
            run_until_done(jobs, kills)
        run_until_done([functools.partial(merge if case.machines else prepare, split)], kills)
        assert hash_files(folder / "split") == hash_files(folder / "plain")
        load_manifest(folder / "split").verify("full")
