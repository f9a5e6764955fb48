"""Prep with random corpora, options and kills, alone or on a cluster, always writes the bytes of an undisturbed run.

A case prepares the same text twice: once in this process, and once by processes that are killed at random points of their
writing (SIGKILL, before or after a file is renamed): the main process, which is started again, and workers of a cluster.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_prep.jobs.dask_cluster  # noqa: F401, so that not every process that is forked imports Dask
from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.data.shard_files.corpus_manifest import load_manifest
from tests.data_prep.cluster_workers import open_cluster, write_kills

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
        machines: whether the workers of a cluster do the steps.
        kills: for each main process in turn, the rename at which it dies and whether before it; the next runs to the end.
        worker_kills: the renames, counted over all workers from the death before, at which a worker dies.
    """

    seed: int
    files: tuple[int, ...]
    compressed: tuple[bool, ...]
    repeats: float
    options: dict[str, object]
    machines: bool
    kills: tuple[tuple[int, bool], ...]
    worker_kills: tuple[tuple[int, bool], ...]


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
    machines=st.booleans(),
    kills=st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=3).map(tuple),
    worker_kills=st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=1).map(tuple),
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


def run_until_done(job: Callable[[], object], kills: list[tuple[int, bool]]) -> None:
    """Run a job, and again if it was killed, until it has succeeded."""
    while True:
        status = os.waitpid(start_process(job, kills.pop() if kills else None), 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, "prep should have gone on"
            return


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The scheduler file of two workers, and the file that orders their deaths."""
    folder = tmp_path_factory.mktemp("cluster")
    with open_cluster(folder, 2) as (scheduler, _):
        yield scheduler, folder / "kills"


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
@pytest.mark.timeout(10 * CASES + 120)
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100)
@given(case=CASES_OF_PREP)
def test_kills_and_machines_change_nothing(case: Case, tiny_corpus: Path, cluster: tuple[str, Path]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        write_source(text, case)
        base = PrepConfig(sources=[str(text)], tokenizer=str(tiny_corpus / "tokenizer"), workers=1, **case.options)  # type: ignore[arg-type]
        plain = dataclasses.replace(base, out=str(folder / "plain"))
        other = dataclasses.replace(base, out=str(folder / "other"))
        if case.machines:
            other = dataclasses.replace(other, workers=0, scheduler=cluster[0])
        refused = error_name(lambda: prepare(plain))
        if refused:
            return
        write_kills(cluster[1], [*case.worker_kills])
        run_until_done(functools.partial(prepare, other), [*case.kills])
        write_kills(cluster[1], [])
        assert hash_files(folder / "other") == hash_files(folder / "plain")
        load_manifest(folder / "other").verify("full")
