"""Validation loss: the printed and written figures equal a plain computation in float64."""

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from launch.commands.eval import evaluate
from megatron_rdt.checkpoint import read_manifest, write_manifest
from megatron_rdt.config import RunConfig
from megatron_rdt.data import TokenCorpus, Tokenizer
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.evaluate.loss import evaluate_checkpoint, measure_losses, perplexity
from megatron_rdt.inference import load
from megatron_rdt.train.trainer import train

Configure = Callable[..., RunConfig]
LENGTH, SEQUENCES = 32, 7


@pytest.fixture(scope="module")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    # A large learning rate makes losses at different T differ.
    assert train(configure(f"--run.root={root}", "--optimizer.lr=0.03", "--train.micro_batch=4")) == 0
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def compute_plainly(run: Path, corpus: Path, loops: int) -> tuple[float, float, float]:
    """Return nats per token, their standard error, and bits per byte over evenly spread windows, in float64."""
    model, _ = load(run)
    model = model.double()
    stream = TokenCorpus(corpus, "valid", LENGTH, 0)
    tokens = stream.read((torch.arange(SEQUENCES) * stream.samples_per_epoch // SEQUENCES * LENGTH).numpy()).tokens
    total, size, means = 0.0, 0, []
    sizes = Tokenizer(corpus / "tokenizer").token_bytes()
    with torch.no_grad():
        for row in tokens:
            before, logits = total, model(row[None, :-1], loops)[0]
            for position, target in enumerate(row[1:].tolist()):
                total += float(torch.logsumexp(logits[position], 0) - logits[position, target])
                size += int(sizes[target])
            means.append((total - before) / LENGTH)
    return total / (SEQUENCES * LENGTH), statistics.stdev(means) / SEQUENCES**0.5, total / math.log(2) / size


def test_the_table_equals_the_plain_computation(
    run: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loops = [1, 2, 5]
    result = evaluate_checkpoint(str(run), loops, SEQUENCES)
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:4] == ["T", "loss", "perplexity", "bits/byte"])
    assert f"({SEQUENCES} sequences, {SEQUENCES * LENGTH} tokens)" in lines[header]
    rows = [line.split() for line in lines[header + 1 : header + 1 + len(loops)]]
    assert lines[header + 1 + len(loops) :] == result["summary"]
    assert [int(row[0]) for row in rows] == loops
    for row in rows:
        loss, error, bits = compute_plainly(run, tiny_corpus, int(row[0]))
        assert result["losses"][row[0]] == pytest.approx(loss, abs=1e-5)
        assert float(row[1]) == pytest.approx(loss, abs=6e-5)
        assert float(row[2]) == pytest.approx(math.exp(loss), rel=1e-4)
        assert float(row[3]) == pytest.approx(bits, abs=6e-5)
        assert result["standard_errors"][row[0]] == pytest.approx(error, abs=1e-5)
        assert float(row[4]) == pytest.approx(error, abs=6e-5)
    assert len({row[1] for row in rows}) > 1
    assert json.loads((run / "eval.json").read_text()) == result
    assert (result["checkpoint"], result["step"], result["sequences"]) == ("step-00000008", 8, SEQUENCES)


def test_the_table_equals_the_evaluation_within_the_run(run: Path, tmp_path: Path) -> None:
    last = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    out = tmp_path / "elsewhere.json"
    result = evaluate_checkpoint(str(run), [3, 1], 4, out=str(out))
    assert {t: pytest.approx(loss, abs=1e-6) for t, loss in last["losses"].items()} == result["losses"]
    assert json.loads(out.read_text()) == result
    assert not (run / "eval.json").exists()
    # A checkpoint of the run by its own name, and an older one.
    assert evaluate_checkpoint(str(run / "checkpoints/step-00000008"), [3, 1], 4)["losses"] == result["losses"]
    older = evaluate_checkpoint(str(run / "checkpoints/step-00000004"), [3], 4)
    assert older["step"] == 4
    assert older["losses"]["3"] != result["losses"]["3"]
    assert json.loads((run / "eval.json").read_text()) == result


def test_micro_batches_and_ranks_do_not_matter(run: Path, tiny_corpus: Path) -> None:
    model, _ = load(run)
    model = model.double()
    windows = TokenCorpus(tiny_corpus, "valid", LENGTH, 0).read(torch.arange(6).numpy() * LENGTH)
    whole = measure_losses(model, windows, [2, 1], 6, torch.device("cpu"))
    for size in (1, 4):  # 4 leaves a smaller last micro-batch
        parts = measure_losses(model, windows, [1, 2], size, torch.device("cpu"))
        assert parts == pytest.approx(whole, abs=1e-12)
    assert [*whole] == [2, 1]
    assert whole[1] == measure_losses(model, windows, [1], 6, torch.device("cpu"))[1]
    # Two "ranks" with their halves: the sum that reaches the reduction adds up to that of one.
    sums: list[torch.Tensor] = []

    def keep(total: torch.Tensor) -> torch.Tensor:
        sums.append(total)
        return total

    for half in (windows.rows(0, 3), windows.rows(3, len(windows))):
        measure_losses(model, half, [2], 2, torch.device("cpu"), reduce=keep)
    total = sums[0] + sums[1]
    assert float(total[0] / total[1]) == pytest.approx(whole[2], abs=1e-12)


def test_a_short_split_gives_fewer_windows(run: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    available = TokenCorpus(tiny_corpus, "valid", LENGTH, 0).samples_per_epoch
    result = evaluate_checkpoint(str(run), [1], available + 1000)
    assert result["sequences"] == available
    out = capsys.readouterr().out
    assert f"the validation split has {available} sequences of {LENGTH} tokens; all are used" in out
    assert f"({available:,} sequences, " in out


def test_windows_may_be_shorter_than_in_training(run: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    """As a run would be evaluated that was trained with them; for a model whose own length nothing here holds."""
    short = LENGTH // 4
    available = TokenCorpus(tiny_corpus, "valid", short, 0).samples_per_epoch
    alone = tmp_path / "long"
    shutil.copytree(run / "checkpoints/step-00000008", alone)
    config = (alone / "config.yaml").read_text()
    trained = f"sequence_length: {LENGTH}\n"
    assert trained in config

    def train_with(length: int) -> None:
        (alone / "config.yaml").write_text(config.replace(trained, f"sequence_length: {length}\n"))
        write_manifest(alone, read_manifest(alone))

    train_with(131_072)
    with pytest.raises(DataError, match="or lower --sequence_length"):
        evaluate_checkpoint(str(alone), [1], 2)
    result = evaluate_checkpoint(str(alone), [1], available, sequence_length=short)
    assert (result["sequences"], result["sequence_length"]) == (available, short)
    train_with(short)
    assert evaluate_checkpoint(str(alone), [1], available)["losses"] == result["losses"]
    for words, message in ((["-1"], "at least 1, or 0"), (["8", "--tasks", "true"], "whole examples")):
        with pytest.raises(ConfigError, match=message):
            evaluate([str(alone), "--sequence_length", *words])


def test_a_checkpoint_outside_a_run_writes_nothing_unasked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tmp_path / "a" / "b" / "converted"
    shutil.copytree(run / "checkpoints/step-00000008", alone)
    below = tmp_path / "checkpoints" / "step-00000008"  # the right name, but not in a run
    shutil.copytree(alone, below)
    before = sorted(tmp_path.rglob("*"))
    for directory in (alone, below):
        evaluate_checkpoint(str(directory), [1], 2)
        assert "no eval.json is written; --out FILE" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    result = evaluate_checkpoint(str(alone), [1], 2, out=str(tmp_path / "mine.json"))
    assert json.loads((tmp_path / "mine.json").read_text()) == result
    assert "--out FILE" not in capsys.readouterr().out
    # A checkpoint of a run is recognised also when named by a relative path.
    monkeypatch.chdir(run / "checkpoints" / "step-00000008")
    assert evaluate_checkpoint(".", [1], 2)["checkpoint"] == "step-00000008"
    assert (run / "eval.json").is_file()


def test_an_unusable_result_file_is_refused_before_evaluating(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("evaluated first")

    monkeypatch.setattr("megatron_rdt.evaluate.loss.score_rows", never)
    (tmp_path / "README.md").write_text("kept")
    (tmp_path / "list.json").write_text("[]")
    for name, text in (
        ("absent/foo.json", "absent does not exist"),
        ("README.md/foo.json", "is not a directory"),
        ("README.md", "is not an evaluation"),
        ("list.json", "is not an evaluation"),
        ("run", "is a directory"),
    ):
        with pytest.raises(ConfigError, match=text):
            evaluate_checkpoint(str(run), [1], 2, out=str(tmp_path / name))
    monkeypatch.setattr("megatron_rdt.evaluate.result_files.os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="not writable"):
        evaluate_checkpoint(str(run), [1], 2, out=str(tmp_path / "new.json"))
    with pytest.raises(ConfigError, match="not writable"):
        evaluate_checkpoint(str(run), [1], 2)
    monkeypatch.undo()
    monkeypatch.setattr("megatron_rdt.evaluate.loss.score_rows", never)
    (run / "eval.json").mkdir()
    with pytest.raises(ConfigError, match=r"eval\.json is a directory, it must be a file"):
        evaluate_checkpoint(str(run), [1], 2)
    assert (tmp_path / "README.md").read_text() == "kept"


def test_a_better_result_of_a_run_is_kept(run: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of a later step counts as better, and one of the same step with more windows or T."""
    newest, older = str(run), str(run / "checkpoints/step-00000004")
    file = run / "eval.json"

    def written(checkpoint: str, loops: list[int], sequences: int, **settings: Any) -> bool:
        before = file.read_bytes() if file.exists() else b""
        result = evaluate_checkpoint(checkpoint, loops, sequences, **settings)
        kept = file.read_bytes() == before
        assert kept == (f"{file} is of" in capsys.readouterr().out)
        assert kept or json.loads(file.read_text()) == result
        return not kept

    assert written(older, [2], 4)
    assert written(newest, [1], 2)
    assert written(newest, [1, 2], 3)
    for checkpoint, loops, sequences in ((older, [1, 2], 9), (newest, [1, 2], 2), (newest, [2], 3)):
        assert not written(checkpoint, loops, sequences)
    for other in ({"data": str(tiny_corpus)}, {"sequence_length": LENGTH // 2}):  # another loss
        assert not written(newest, [1, 2], 9, **other)
    file.write_text("damaged")
    assert written(older, [1], 2, data=str(tiny_corpus))
    assert json.loads(file.read_text())["data"] == tiny_corpus.name
    assert not written(older, [1], 2)
    assert written(newest, [1], 2)


def test_an_earlier_evaluation_is_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    evaluate_checkpoint(str(run), [1], 2, out=str(out))
    evaluate_checkpoint(str(run), [2], 2, out=str(out))
    assert list(json.loads(out.read_text())["losses"]) == ["2"]


def test_a_missing_corpus_is_named_with_the_option(
    run: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"'my data' .*looked for in {re.escape(str(tmp_path))}.*--data DIR"):
        evaluate_checkpoint(str(run), [1], 2, data="my data")
    empty = Path(shutil.copytree(tiny_corpus, tmp_path / "empty"))
    manifest = json.loads((empty / "manifest.json").read_text())
    manifest["splits"]["valid"] = {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []}
    (empty / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"validation split of .*empty has 0 tokens.*--data DIR"):
        evaluate_checkpoint(str(run), [1], 2, data=str(empty))


@pytest.mark.parametrize(("loops", "sequences"), [([0], 4), ([2, -1], 4), ([], 4), ([2], 0)])
def test_wrong_numbers_are_refused(loops: list[int], sequences: int, run: Path) -> None:
    with pytest.raises(ConfigError, match="at least"):
        evaluate_checkpoint(str(run), loops, sequences)


def test_data_of_another_tokenizer_is_refused(run: Path, tiny_text: Path, tmp_path: Path) -> None:
    other = prepare(
        PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "other"), vocab_size=400, valid_fraction=0.2, workers=1)
    )
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate_checkpoint(str(run), [1], 4, data=str(other))


def test_a_damaged_checkpoint_is_refused(run: Path) -> None:
    victim = next((run / "checkpoints/step-00000008/model").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=victim.name):
        evaluate_checkpoint(str(run / "checkpoints/step-00000008"), [1], 4)
    assert evaluate_checkpoint(str(run), [1], 4)["step"] == 6


def test_perplexity_of_a_diverged_model_is_a_number() -> None:
    assert perplexity(2.0) == pytest.approx(math.e**2)
    assert perplexity(5000.0) == math.inf
    assert math.isinf(perplexity(math.inf))
    assert math.isnan(perplexity(math.nan))
