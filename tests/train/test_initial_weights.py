"""`--init`: a new run takes the weights of another and nothing else of it; later starts continue the new run."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.commands.train import train as rdt_train
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.convert import convert
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.parallel.zero_universal import write_universal
from megatron_rdt.train import trainer
from tests.train.runs import Configure, read_all_files, read_records

Begin = Callable[..., int]


@pytest.fixture
def begin(configure: Configure, tmp_path: Path) -> Begin:
    """Function that trains the run `new` of two steps from weights, with more options."""

    def train(init: Path | str, *words: str, resume: str = "none") -> int:
        options = [f"--run.root={tmp_path}", "--run.name=new", "--train.steps=2", "--eval.every=0", *words]
        return trainer.train(configure(*options), resume, init=str(init))

    return train


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Directory of the run that `begin` trains."""
    return tmp_path / "new"


def last_checkpoint(run: Path) -> Path:
    return checkpoints.list_complete_checkpoints(run)[-1]


def check_same_weights(one: Path, other: Path) -> None:
    before, after = (checkpoints.read_model_weights(path) for path in (one, other))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-20)


def stop_before_saving(begin: Begin, monkeypatch: pytest.MonkeyPatch, *arguments: Any, **named: Any) -> None:
    """Train until the first save, which fails as if the process had been killed."""

    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stage_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            begin(*arguments, **named)


def test_the_weights_are_taken_and_nothing_else(
    begin: Begin, new: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a tiny learning rate the weights stay those that the run began with, so its checkpoint shows them."""
    options = ["--optimizer.lr=1e-30", "--train.sequence_length=64", "--model.rope_base=50000", "--depth.mean=2"]
    assert begin(finished, *options, "--run.seed=3", "--optimizer.name=muon") == 0
    source = last_checkpoint(finished)
    said = capsys.readouterr().out
    assert f"weights from {source} (step 4 of first), and nothing else of it: the run begins at step 0" in said
    for change in ("rope_base 10000.0 -> 50000.0", "train.sequence_length 32 -> 64", "depth.mean 3.0 -> 2.0"):
        assert change in said
    check_same_weights(source, last_checkpoint(new))
    records = read_records(new / "metrics.jsonl")
    assert [(record["step"], record["tokens"]) for record in records] == [(1, 4 * 64), (2, 8 * 64)]
    manifest = checkpoints.read_manifest(last_checkpoint(new))
    assert manifest["run_id"] != checkpoints.read_manifest(source)["run_id"]
    assert manifest["parent"] is None
    origin = json.loads((new / "origin.json").read_text())
    assert manifest["origin"] == origin
    assert (origin["checkpoint"], origin["step"], origin["weights_only"]) == (str(source), 4, True)


@pytest.mark.parametrize("name", ["latest", "checkpoints", "checkpoints/step-00000002"])
def test_what_may_be_named(name: str, begin: Begin, new: Path, finished: Path) -> None:
    assert begin(finished / name, "--optimizer.lr=1e-30") == 0
    source = finished / name if "step" in name else last_checkpoint(finished)
    check_same_weights(source, last_checkpoint(new))


def test_exports_and_converted_checkpoints(begin: Begin, new: Path, finished: Path, tmp_path: Path) -> None:
    source = last_checkpoint(finished)
    for kind in ("hf", "native", "zero"):
        out = convert(str(source), str(tmp_path / kind), kind)
        assert begin(out, "--optimizer.lr=1e-30") == 0
        check_same_weights(source, last_checkpoint(new))
        origin = json.loads((new / "origin.json").read_text())
        assert ("weights_sha256" if kind == "hf" else "manifest_sha256") in origin
        shutil.rmtree(new)


def test_a_requeued_run_begins_once(
    begin: Begin, new: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = Path(shutil.copytree(finished, tmp_path / "source"))
    named = last_checkpoint(source)
    stop_before_saving(begin, monkeypatch, source, resume="auto")
    assert (
        f"{new} has no checkpoint: it begins with the weights of {named}\nweights from {named}"
        in capsys.readouterr().out
    )
    # The source has gone on meanwhile: the run begins again where it began, with the weights alone.
    later = named.with_name("step-00000006")
    shutil.copytree(named, later)
    manifest = checkpoints.read_manifest(later)
    checkpoints.write_manifest(later, {**manifest, "step": 6, "sequence": 9})
    stop_before_saving(begin, monkeypatch, source, resume="auto")
    said = capsys.readouterr().out
    assert f"{new} has no checkpoint: it starts again from its origin, {named}; the records of 2 steps" in said
    assert f"weights from {named}" in said
    stop_before_saving(begin, monkeypatch, "none", resume="auto")
    assert f"weights from {named}" in capsys.readouterr().out, "the origin tells, without the option"
    assert begin(source, resume="auto") == 0
    assert [record["step"] for record in read_records(new / "metrics.jsonl")] == [1, 2]
    # From now on its own checkpoints count, though the origin and its record are gone.
    shutil.rmtree(source)
    (new / "origin.json").unlink()
    capsys.readouterr()
    assert begin(source, "--train.steps=3", resume="auto") == 0
    assert f"resuming {new} from checkpoint step-00000002" in capsys.readouterr().out
    assert checkpoints.read_manifest(last_checkpoint(new))["origin"]["checkpoint"] == str(named)


def test_an_origin_that_is_gone_is_not_replaced_by_another_start(
    begin: Begin, new: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(last_checkpoint(finished), tmp_path / "source"))
    stop_before_saving(begin, monkeypatch, source)
    before = read_all_files(new)
    copy = source.rename(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"does not exist any more.*name a copy of it: --init PATH --resume auto"):
        begin(source, resume="auto")
    with pytest.raises(ConfigError, match=rf"holds the records of 2 steps of its own, which a run from {copy} would"):
        begin("none", resume=str(copy))
    assert read_all_files(new) == before
    assert begin(copy, resume="auto") == 0


@pytest.mark.parametrize("state", ["moved", "damaged"])
def test_a_copy_of_the_run_of_its_origin_may_be_named(
    state: str, begin: Begin, new: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = Path(shutil.copytree(finished, tmp_path / "source"))
    origin = last_checkpoint(source)
    stop_before_saving(begin, monkeypatch, source)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    if state == "moved":
        shutil.rmtree(source)
    else:
        (origin / "trainer.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"cannot be taken: .* trainer\.json has.*name a copy of it: --init"):
            begin(source, resume="auto")
    assert begin(copy / "latest", resume="auto") == 0
    assert (f"skipping: {origin} is damaged: trainer.json" in caplog.text) == (state == "damaged")
    assert json.loads((new / "origin.json").read_text())["checkpoint"] == str(last_checkpoint(copy))
    assert begin(copy, "--train.steps=3", resume="auto") == 0


def test_folders_that_hold_no_weights(begin: Begin, new: Path, finished: Path, tmp_path: Path) -> None:
    export = Path(convert(str(finished), str(tmp_path / "hf"), "hf"))
    (export / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"config\.json is not the config of an export .*Export the checkpoint again"
    ):
        begin(export)
    corpus = Path(shutil.copytree(finished, tmp_path / "corpus"))
    (corpus / "manifest.json").write_text('{"format": "rdt-tokens", "version": 1}')
    with pytest.raises(CheckpointError, match=r"corpus is not a checkpoint: the format of its .* Name a run"):
        begin(corpus)
    assert not new.exists()


def test_a_run_is_not_begun_over_another(begin: Begin, new: Path, finished: Path) -> None:
    assert begin("none") == 0
    before = read_all_files(new)
    with pytest.raises(ConfigError, match=r"already holds checkpoints\. Continue it with --resume auto"):
        begin(finished)
    for source in (finished, new):
        with pytest.raises(
            ConfigError, match=r"holds checkpoints; it began from random weights, not from the weights of"
        ):
            begin(source, resume="auto")
    assert read_all_files(new) == before


def test_another_origin_is_refused(begin: Begin, new: Path, finished: Path) -> None:
    first, second = (finished / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    assert begin(first) == 0
    before = read_all_files(new)
    with pytest.raises(ConfigError, match=rf"it began from the weights of {first}, not from the weights of {second}"):
        begin(second, resume="auto")
    assert begin(finished, "--train.steps=2", resume="auto") == 0, "the run of its origin"
    assert {p: c for p, c in read_all_files(new).items() if "step-" in p} == {
        p: c for p, c in before.items() if "step-" in p
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--model.dim=64",
            r"dim is 32 there and 64 here; tensors that differ: embedding\.weight \(\(512, 32\) there, \(512, 64\) .*more",
        ),
        ("--model.core_layers=2", r"core_layers is 1 there and 2 here; .*core\.layers\.1\.\S+ \(absent there, \("),
        ("--model.norm_eps=0.1", "norm_eps is 1e-06 there and 0.1 here; its tensors have the same shapes, but would"),
    ],
)
def test_another_model_is_refused(option: str, message: str, begin: Begin, new: Path, finished: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is of another model: {message}.*without --init"):
        begin(finished, option)
    assert not new.exists()


def test_another_tokenizer_is_refused(
    begin: Begin, finished: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(last_checkpoint(finished), tmp_path / "source"))
    shutil.rmtree(source / "tokenizer")
    shutil.copytree(tokenizer_folders["bpe"], source / "tokenizer")
    checkpoints.write_manifest(source)
    with pytest.raises(CheckpointError, match=rf"another tokenizer \(640 pieces\).*rdt prep --tokenizer {source}"):
        begin(source)


def test_weights_that_are_not_finite_or_damaged_are_refused(begin: Begin, finished: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(last_checkpoint(finished), tmp_path / "source"))
    weights = checkpoints.read_model_weights(source)
    weights["embedding.weight"][0, 0] = torch.nan
    shutil.rmtree(source / "model")
    write_universal(
        source / "universal", {n: dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), w) for n, w in weights.items()}, 4
    )
    with pytest.raises(CheckpointError, match="is damaged"):
        begin(source)
    checkpoints.write_manifest(source)
    with pytest.raises(CheckpointError, match=f"some weights of {source} are not finite. Name a checkpoint in --init"):
        begin(source)
    shutil.rmtree(source / "universal" / "zero" / "embedding.weight")
    checkpoints.write_manifest(source)
    with pytest.raises(CheckpointError, match=r"does not fit its own config; .*embedding\.weight \(absent there"):
        begin(source)


def test_a_folder_of_another_project_is_refused(begin: Begin, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint, a run, or an export of this project\..*rdt convert"
    ):
        begin(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a model of type llama, not one that `rdt convert --to hf` wrote"):
        begin(folder)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        begin(tmp_path / "absent")
    assert not (tmp_path / "new").exists()


def test_refusals_to_resume_name_the_way_out(begin: Begin, finished: Path, configure: Configure) -> None:
    source = last_checkpoint(finished)
    for option in (
        "--train.sequence_length=64", "--run.seed=9", "--train.steps=3", "--optimizer.name=muon", "--model.rope_base=5e4"
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"start a new --run\.name from its weights: --init {source}\."):
            begin("none", option, resume=str(source))


def test_the_recipe_of_the_docs_for_two_stages(repository: Path, tiny_options: list[str], tmp_path: Path) -> None:
    """Runs the commands of the page, with the tiny model and data."""
    page = (repository / "docs" / "checkpoints.md").read_text()
    block = page.partition("## A second stage with longer sequences")[2].partition("```bash\n")[2].partition("```")[0]
    commands = [
        words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))
    ]
    assert [words[:2] for words in commands] == [["rdt", "train"]] * 2
    short, long = (tmp_path / commands[n][commands[n].index("--run.name") + 1] for n in (0, 1))
    for words in commands:
        options = [str(tmp_path / Path(word).name) if word == f"runs/{short.name}" else word for word in words[2:]]
        options[options.index("--config") + 1] = str(repository / options[options.index("--config") + 1])
        options += ["--train.steps=5", "--train.global_batch=1", "--eval.every=0", "--sample.every=0"]
        assert rdt_train([*tiny_options, *options, f"--run.root={tmp_path}"]) == 0
    configs: list[RunConfig] = [load_config(run / "config.yaml") for run in (short, long)]
    assert configs[0].train.sequence_length < configs[1].train.sequence_length
    assert configs[0].model.rope_base < configs[1].model.rope_base
    assert dataclasses.replace(configs[0].model, rope_base=configs[1].model.rope_base) == configs[1].model
    assert json.loads((long / "origin.json").read_text())["checkpoint"] == str(last_checkpoint(short))
