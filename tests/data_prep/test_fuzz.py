"""Prep under random corpora, options, numbers of machines and kills: always the bytes of a plain run.

A case prepares the same text twice: once plainly in this process, once by machines that each do a part, in processes that
are killed at a random point of their writing (SIGKILL, before or after a file gets its name) as often as the case says,
and are started again. RDT_FUZZ_CASES sets the number of cases.
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
    """One corpus, the options, and what happens on the way.

    Attributes:
        seed: of the text.
        files: documents in each file.
        compressed: whether each file is a .jsonl.zst.
        repeats: share of documents that stood before.
        options: of prep.
        machines: number of tasks that share the job; 0 is a plain run.
        together: whether these run at the same time.
        kills: at which rename each process that is started dies, and whether before it; those left run to the end.
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


def write_text(folder: Path, case: Case) -> None:
    """The case's files of JSON lines."""
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


def started(work: Callable[[], object], kill: tuple[int, bool] | None) -> int:
    """Do the work in a process, which is killed at its n-th rename where `kill` says so; its number."""
    child = os.fork()
    if child:
        return child
    count, replace = 0, os.replace

    def counted(source: object, target: object, **places: object) -> None:
        nonlocal count
        count += 1
        if kill == (count, True):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **places)  # type: ignore[arg-type]
        if kill == (count, False):
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        os.replace = os.rename = counted  # type: ignore[assignment]
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def run_through(works: list[Callable[[], object]], kills: list[tuple[int, bool]]) -> None:
    """Do all works at the same time, and those that were killed again, until all have ended well."""
    while works:
        children = [(started(work, kills.pop() if kills else None), work) for work in works]
        states = [(os.waitpid(child, 0)[1], work) for child, work in children]
        assert all(os.WIFSIGNALED(status) or status == 0 for status, _ in states), "prep should have gone on"
        works = [work for status, work in states if os.WIFSIGNALED(status)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks look at each other often, and soon take over what a dead one had claimed."""
    monkeypatch.setattr(leases, "EXPIRE_S", 0.5)
    monkeypatch.setattr(leases, "RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(step_runner, "LOOK_AT_OTHERS_EVERY_S", 0.02)
    monkeypatch.setattr(step_runner, "POLL_S", 0.02)


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by relative path; of the manifest what does not name places and times."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            document = json.loads(content)
            document["prep"]["options"].pop("out", None)
            content = json.dumps(document, sort_keys=True).encode()
        found[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return found


def outcome(work: Callable[[], object]) -> str:
    """What the work says where it cannot be done (an empty split, say), or ""."""
    from megatron_rdt.errors import RdtError

    try:
        work()
    except RdtError as error:
        return type(error).__name__
    return ""


@pytest.mark.distributed
@pytest.mark.timeout(10 * CASES + 60)
@pytest.mark.usefixtures("impatient")
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100)
@given(case=CASES_OF_PREP)
def test_kills_and_machines_change_nothing(case: Case, tiny_corpus: Path) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        write_text(text, case)
        base = PrepConfig(sources=[str(text)], tokenizer=str(tiny_corpus / "tokenizer"), workers=1, **case.options)  # type: ignore[arg-type]
        plain = dataclasses.replace(base, out=str(folder / "plain"))
        split = dataclasses.replace(base, out=str(folder / "split"))
        refused = outcome(lambda: prepare(plain))
        if refused:
            return
        tasks = [dataclasses.replace(split, shard=f"{i}/{case.machines}") for i in range(case.machines)]
        shares: list[Callable[[], object]] = [functools.partial(prepare, task) for task in tasks]
        kills = list(case.kills)
        for works in [shares] if case.together else [[share] for share in shares]:
            run_through(works, kills)
        run_through([functools.partial(merge if case.machines else prepare, split)], kills)
        assert contents(folder / "split") == contents(folder / "plain")
        load_manifest(folder / "split").verify("full")
