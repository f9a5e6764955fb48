"""Wrong options, files and data through the whole command: one clear sentence, the right status, nothing damaged."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Result = subprocess.CompletedProcess[str]
Run = Callable[..., Result]
USAGE, FAILED = 2, 1
SMOKE = ["--config", "configs/smoke.yaml"]


def check_refused(result: Result, status: int, *parts: str) -> None:
    """Check that the command failed with `status` and one error line that contains all of `parts`."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in re.split(r"[\r\n]", result.stderr) if "error:" in line]
    assert len(errors) == 1, result.stderr
    assert re.match(r"rdt( \w+)?: error: ", errors[0])
    assert not [part for part in parts if part not in errors[0]], errors[0]
    assert not [word for word in ("<class", "typing.", "Namespace", "Errno") if word in errors[0]]


def files_below(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


WRONG_WORDS = [
    (["trian"], ["no command trian", "Did you mean train?"]),
    (["train", "--config", "configs/none.yaml"], ["configs/none.yaml does not exist", "Check the path"]),
    (
        ["train", "--config", "configs/models/huginn_3.5b.yaml"],
        ["configs/models/huginn_3.5b.yaml does not exist. Did you mean configs/models/huginn_3_5b.yaml?"],
    ),
    (["plan", "--config", "configs/parcae_140m.yaml"], ["Did you mean configs/models/parcae_140m.yaml?"]),
    (["submit", "--config", "configs/quickstat.yaml"], ["Did you mean configs/quickstart.yaml?"]),
    (["prep", "--config", "config/smoke_data.yml"], ["Did you mean configs/smoke_data.yaml?"]),
    (["prep", "--config", "quickstart_task.yaml"], ["Did you mean configs/quickstart_tasks.yaml?"]),
    (["prep", "tasks", "--config", "configs/quickstart"], ["Did you mean configs/quickstart.yaml?"]),
    (["train", "--parallel.deepspeed", "configs/smok.json"], ["Did you mean configs/smoke.yaml?"]),
    (["train", "configs/smoke.yaml"], ["configs/smoke.yaml", "Did you mean --config configs/smoke.yaml?"]),
    (["train", "--depth.meen", "3"], ["--depth.meen does not exist", "Did you mean depth.mean?"]),
    (["train", "--lr", "3"], ["--lr does not exist", "Did you mean optimizer.lr?"]),
    (["train", "--model", "3"], ["--model is a section", "such as model.vocab_size"]),
    (["train", "-n", "3"], ["-n does not exist", "two dashes"]),
    (["train", "--depth.mean"], ["--depth.mean needs a value"]),
    (["train", "--print_config=yes"], ["--print_config takes no value"]),
    (["train", "--model.dim", "wide"], ["--model.dim needs a whole number, not 'wide'"]),
    (["train", "--model.dim=1.5"], ["--model.dim needs a whole number, not '1.5'"]),
    (["train", "--train.precision=fp8"], ["--train.precision needs float32 or bfloat16, not 'fp8'"]),
    (["train", "--depth.backprop=some"], ["--depth.backprop needs a whole number or all, not 'some'"]),
    (["train", "--eval.loops=1,x"], ["--eval.loops needs a list of whole numbers such as 1,4, not one that holds 'x'"]),
    (["train", "--eval.loops", "1", "4"], ["the word 4", "a list is one word"]),
    (["train", "--nproc", "two"], ["--nproc needs a whole number, not 'two'"]),
    (
        ["train", *SMOKE, "--model.heads=5", "--model.kv_heads=1"],
        ["model.dim 64", "model.heads 5", "Set --model.heads 4"],
    ),
    (["train", *SMOKE, "--model.kv_heads=3"], ["model.heads 4", "model.kv_heads 3"]),
    (["train", *SMOKE, "--train.global_batch=9"], ["train.global_batch 9", "nearest: 8, 12"]),
    (["train", *SMOKE, "--depth.mean=9"], ["mean 9.0, max 8"]),
    (["eval"], ["CHECKPOINT is missing", "rdt eval CHECKPOINT [options]"]),
    (["convert", "runs/a"], ["OUT is missing", "rdt convert SOURCE OUT [options]"]),
    (["convert", "a", "b", "--to", "onnx"], ["--to needs one of hf, native", "not 'onnx'"]),
    (["eval", "runs/a", "--loops", "0"], ["--loops", "at least 1"]),
    (["generate", "runs/a", "--top_p", "0"], ["--top_p is 0.0, it must be above 0 and at most 1."]),
    (["submit", "--nodes", "2"], ["--config is missing"]),
    (["submit", "--nodez", "2"], ["--nodez does not exist", "Did you mean nodes?"]),
    (["submit", "--config", "c.yaml", "--dry-run=maybe"], ["--dry_run needs true or false, not 'maybe'"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG_WORDS, ids=[" ".join(words) for words, _ in WRONG_WORDS])
def test_wrong_words(words: list[str], parts: list[str], forked_rdt: Run) -> None:
    check_refused(forked_rdt(*words), USAGE, *parts)


def test_a_source_that_does_not_exist(forked_rdt: Run, tmp_path: Path) -> None:
    result = forked_rdt("prep", "--sources", "nowhere", "--out", tmp_path / "corpus")
    check_refused(result, USAGE, "source nowhere does not exist", "--sources")
    assert not [*tmp_path.iterdir()]


WRONG_FILES = [
    (b"depth: {meen: 3}", ["c.yaml: key depth.meen does not exist", "Did you mean depth.mean?"]),
    (b"lr: 3", ["c.yaml: key lr does not exist", "Did you mean optimizer.lr?"]),
    (b"model: {dim: wide}", ["c.yaml: key model.dim needs a whole number, not 'wide'"]),
    (b"model: 5", ["c.yaml: key model is a section"]),
    (b"model:\n# dim: 3\n", ["c.yaml: key model is a section", "or be omitted"]),
    (b"train: {steps: 3}\ntrain: {steps: 4}", ["not valid YAML", "key train is given twice, again in line 2"]),
    (b"a: [", ["c.yaml is not valid YAML", "Fix it"]),
    (b"# nothing\n", ["c.yaml is empty", "omit --config"]),
    (b"- 1", ["c.yaml must hold `key: value` lines"]),
    (b"\xff\xfe", ["c.yaml is not UTF-8 text"]),
    (b"resume: auto", ["c.yaml: key resume does not exist"]),
]


@pytest.mark.parametrize(("content", "parts"), WRONG_FILES, ids=[str(content) for content, _ in WRONG_FILES])
def test_wrong_config_files(content: bytes, parts: list[str], forked_rdt: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    check_refused(forked_rdt("train", "--config", tmp_path / "c.yaml"), USAGE, *parts)


def test_run_that_cannot_start(forked_rdt: Run, tmp_path: Path, tiny_options: list[str]) -> None:
    options = [*tiny_options, f"--run.root={tmp_path / 'runs'}"]
    check_refused(
        forked_rdt("train", *options, "--nproc=2"), USAGE, "parallel.engine is single, but there are 2 processes"
    )
    check_refused(forked_rdt("train", *options, "--nproc=-1"), USAGE, "--nproc is -1")
    missing = forked_rdt("train", *options, f"--data.path={tmp_path}")
    check_refused(missing, FAILED, f"{tmp_path}/manifest.json does not exist", "rdt prep --config FILE")
    (tmp_path / "file").write_text("")
    under = forked_rdt("train", *tiny_options, f"--run.root={tmp_path / 'file' / 'runs'}")
    check_refused(under, USAGE, "run.root", f"{tmp_path / 'file'} is not a directory", "Set --run.root")
    many = ["--parallel.engine=fsdp", "--nproc=2", "--master_port=70000"]
    check_refused(forked_rdt("train", *options, *many), USAGE, "--master_port is 70000", "0 for any free one")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    """A prepared corpus to damage."""
    return Path(shutil.copytree(tiny_corpus, tmp_path / "corpus"))


def cut_shard(corpus: Path) -> None:
    shard = corpus / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])


def fill_shard(corpus: Path) -> None:
    shard = corpus / "train" / "shard-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)


def swap_tokenizer(corpus: Path) -> None:
    """Change the fingerprint in the manifest, so that it is another tokenizer's."""
    path = corpus / "manifest.json"
    document = json.loads(path.read_text())
    document["tokenizer"]["fingerprint"] = document["tokenizer"]["fingerprint"][::-1]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "option", "status", "parts"),
    [
        (cut_shard, "", FAILED, ["shard-00000.bin has", "the manifest says"]),
        (fill_shard, "", FAILED, ["holds id 65535"]),
        (swap_tokenizer, "", FAILED, ["not the tokenizer that made these shards"]),
        (None, "--train.sequence_length=1000000", FAILED, ["needs at least 2 x sequence_length = 2000000"]),
        (None, "--model.vocab_size=500", USAGE, ["model.vocab_size is 500", "512 pieces", "--model.vocab_size 512"]),
        (None, "--resume=nowhere", FAILED, ["nowhere does not exist", "Name a run directory"]),
        (None, "--resume=Auto", USAGE, ["--resume 'Auto' is no choice of --resume", "Did you mean auto?"]),
        (None, "--resume=non", USAGE, ["--resume 'non' is no choice of --resume", "Did you mean none?"]),
        (None, "--init=nowhere", FAILED, ["nowhere does not exist", "Name a run directory"]),
        (None, "--init=", USAGE, ["--init is empty", "omit it"]),
    ],
    ids=["cut", "token", "tokenizer", "short", "vocabulary", "resume", "auto", "none", "init", "empty"],
)
def test_wrong_data(
    damage: Callable[[Path], None] | None,
    option: str,
    status: int,
    parts: list[str],
    forked_rdt: Run,
    corpus: Path,
    tmp_path: Path,
    tiny_options: list[str],
) -> None:
    if damage is not None:
        damage(corpus)
    words = [*tiny_options, f"--data.path={corpus}", f"--run.root={tmp_path / 'runs'}", *filter(None, [option])]
    check_refused(forked_rdt("train", *words), status, *parts)
    assert not list(tmp_path.rglob("step-*"))


@pytest.fixture(scope="module")
def trained(forked_rdt: Run, tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, started with --resume auto where there is nothing to resume."""
    root = tmp_path_factory.mktemp("runs")
    result = forked_rdt(
        "train", *tiny_options, f"--run.root={root}", "--run.name=r", "--train.steps=2", "--resume=auto"
    )
    assert result.returncode == 0, result.stderr
    assert "resumed" not in result.stdout
    return root / "r"


def test_runs_are_not_overwritten(forked_rdt: Run, trained: Path, tiny_options: list[str]) -> None:
    before = files_below(trained)
    options = [*tiny_options, f"--run.root={trained.parent}"]
    same = forked_rdt("train", *options, "--run.name=r")
    check_refused(same, USAGE, f"{trained} already holds checkpoints", "--resume auto", "another --run.name")
    other = forked_rdt("train", *options, "--run.name=s", "--resume", trained, "--model.dim=64")
    check_refused(other, FAILED, "is of another model", "dim is 32 there and 64 here", "start a new --run.name")
    both = forked_rdt("train", *options, "--run.name=s", "--resume", trained, "--init", trained)
    check_refused(both, USAGE, f"--resume {trained} continues a run", "Omit one", "--resume auto")
    assert files_below(trained) == before
    assert not (trained.parent / "s" / "checkpoints").exists()


def test_latest_and_checkpoints_of_a_run_mean_the_run(
    forked_rdt: Run, trained: Path, tiny_options: list[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "r"))
    for steps, name in ((3, "latest"), (4, "checkpoints")):
        words = [*tiny_options, f"--run.root={tmp_path}", "--run.name=r", f"--train.steps={steps}"]
        result = forked_rdt("train", *words, "--resume", run / name)
        assert result.returncode == 0, result.stderr
        assert f"resumed from {run / 'checkpoints'}/step-0000000{steps - 1}" in result.stdout


def test_directories_without_checkpoints_are_refused(forked_rdt: Run, trained: Path, tmp_path: Path) -> None:
    check_refused(forked_rdt("eval", tmp_path), FAILED, f"{tmp_path} holds no complete checkpoint", "step-NNNNNNNN")
    out = tmp_path.parent / "converted"
    check_refused(
        forked_rdt("convert", tmp_path, out),
        FAILED,
        f"{tmp_path} holds no run, no checkpoint",
        "Name the folder or file",
    )
    check_refused(
        forked_rdt("report", tmp_path), FAILED, f"{tmp_path} has no metrics.jsonl", "Name the directory of a run"
    )
    check_refused(forked_rdt("eval", trained / "config.yaml"), FAILED, "config.yaml is a file", "Name a run directory")
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "out.json"
    check_refused(
        forked_rdt("eval", trained, "--sequences=2", "--loops=1", "--out", out), USAGE, str(out), "is not a directory"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"caf\xc3\xa9\n\xe9\n", ["a.txt:2: invalid UTF-8 byte 0xe9 at byte 6", "--on_bad skip"]),
        ("a.txt", b"", ["no document with text", "a.txt", "Check the sources"]),
        ("a.txt", b"only a few words\n", ["vocab_size 4096 is too large", "Set --vocab_size"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["a.jsonl:2 (byte 14): not valid JSON", "--on_bad skip"]),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ['a.jsonl:2: field "text" is missing', "keys present: body"]),
    ],
    ids=["utf-8", "empty", "short", "json", "field"],
)
def test_wrong_text(name: str, content: bytes, parts: list[str], forked_rdt: Run, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    options = ["--out", tmp_path / "out", "--workers=1", "--valid_fraction=0"]
    check_refused(forked_rdt("prep", "--sources", tmp_path / name, *options), FAILED, *parts)
    # The prepared parts stay, since another --vocab_size can use them.
    assert {path.name for path in tmp_path.iterdir()} - {".out.prep"} == {name}


def test_prep_keeps_existing_files(forked_rdt: Run, corpus: Path, tmp_path: Path, tiny_text: Path) -> None:
    before = files_below(corpus)
    changed = forked_rdt("prep", "--sources", tiny_text, "--out", corpus, "--vocab_size=300")
    check_refused(changed, USAGE, "vocab_size=512, now 300", "--restart true")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    check_refused(
        forked_rdt("prep", "--out", tmp_path / "notes"), USAGE, "was not written by `rdt prep`", "Choose another --out"
    )
    under = forked_rdt("prep", "--sources", tiny_text, "--out", tmp_path / "notes" / "mine.txt" / "out")
    check_refused(under, USAGE, "mine.txt cannot be made", "Choose another --out")
    assert files_below(corpus) == before
    assert files_below(tmp_path / "notes") == {"mine.txt": b"kept"}
