"""`rdt eval --harness`: what lm_eval is told equals the model's own logits, and nothing is done in vain."""

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.commands.eval import evaluate
from megatron_rdt.config import RunConfig
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.evaluate import harness
from megatron_rdt.evaluate.harness import evaluate_harness
from megatron_rdt.evaluate.harness_results import find_drawn_rows, read_harness_scores
from megatron_rdt.evaluate.report import write_report
from megatron_rdt.inference import load
from megatron_rdt.train.metrics import drop_records_after
from megatron_rdt.train.trainer import train
from tests.evaluate.harness_tasks import write_harness_tasks

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'megatron_rdt[harness]'")
pytestmark = pytest.mark.slow
lm_tasks = pytest.importorskip("lm_eval.tasks")
harness_model = pytest.importorskip("megatron_rdt.evaluate.harness_model")
HarnessModel = harness_model.HarnessModel
LOOPS, LENGTH = (1, 3, 6), 32


@pytest.fixture(scope="module")
def lines(tiny_text: Path) -> list[str]:
    """Lines of text of several words, some longer than the context."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(tiny_text.glob("json-*")))
    return [*[line for line in text.splitlines() if len(line.split()) >= 4][:20], "a b c d e f g " * 12]


@pytest.fixture(scope="module")
def tasks(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harness_tasks(tmp_path_factory.mktemp("harness") / "tasks", lines)


@pytest.fixture(scope="module")
def finished(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    options = ("--eval.every=0", "--optimizer.lr=2e-2", "--logging.tensorboard=true")
    assert train(configure(f"--run.root={root}", *options)) == 0
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the tasks of lm_eval out: to list them takes seconds."""
    monkeypatch.setattr(lm_tasks, "TaskManager", functools.partial(lm_tasks.TaskManager, include_defaults=False))


class Plain:
    """One text at a time, float64 sums of the model's logits."""

    def __init__(self, run: Path, bos: bool = False) -> None:
        self.model, self.tokenizer = load(run)
        self.bos = [self.tokenizer.bos] if bos else []

    @torch.no_grad()
    def score(self, ids: list[int], scored: int, loops: int) -> tuple[float, bool]:
        ids = ids[-LENGTH - 1 :]
        logits = self.model(torch.tensor([ids[:-1]]), loops)[0, -scored:].double()
        targets = torch.tensor(ids[-scored:])
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())

    def loglikelihood(self, context: str, continuation: str, loops: int) -> tuple[float, bool]:
        begin, whole = self.tokenizer.encode(context), self.tokenizer.encode(context + continuation)
        return self.score([*self.bos, *whole], len(whole) - len(begin), loops)

    def rolling(self, text: str, loops: int) -> float:
        ids = self.tokenizer.encode(text)
        ids, total = [*(self.bos or [self.tokenizer.eos]), *ids], 0.0
        for first in range(1, len(ids), LENGTH):  # every window predicts what the ones before it have not
            end = min(first + LENGTH, len(ids))
            total += self.score(ids[max(end - LENGTH - 1, 0) : end], end - first, loops)[0]
        return total

    @torch.no_grad()
    def continuation(self, prompt: str, until: list[str], new: int, loops: int) -> str:
        ids = [*self.bos, *self.tokenizer.encode(prompt)][-(LENGTH - new) :]
        added: list[int] = []
        unused = self.model.config.unused_ids
        while len(added) < new and not (added and added[-1] == self.tokenizer.eos):
            logits = self.model(torch.tensor([ids + added]), loops)[0, -1]
            added.append(int(logits[: len(logits) - unused].argmax()))
        text = self.tokenizer.decode(added)
        return text[: min([text.find(stop) for stop in until if stop in text], default=len(text))]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.mark.parametrize("bos", [False, True])
def test_answers_equal_the_models_logits(run: Path, lines: list[str], bos: bool) -> None:
    plain = Plain(run, bos)
    plain.tokenizer.begins_with_bos = bos
    model = HarnessModel(plain.model, plain.tokenizer, LOOPS, LENGTH, 4)
    pairs = [(line.rpartition(" ")[0].rstrip(), " " + line.split()[-1]) for line in lines]
    pairs.append(pairs[0])
    settings = {"until": ["\n", "e"], "max_gen_toks": 12}
    seen = set()
    for loops in LOOPS:
        model.loops = loops
        for pair, (score, likeliest) in zip(
            pairs, model.loglikelihood([request(*pair) for pair in pairs]), strict=True
        ):
            expected, is_likeliest = plain.loglikelihood(*pair, loops)
            assert score == pytest.approx(expected, abs=1e-4)
            assert likeliest == is_likeliest
            seen.add((pair, round(score, 4)))
        texts = ["\n".join(lines[:3]), lines[-1], lines[0], ""]
        for text, score in zip(texts, model.loglikelihood_rolling([request(text) for text in texts]), strict=True):
            assert score == pytest.approx(plain.rolling(text, loops) if text else 0.0, abs=1e-4)
        prompts = [line[: len(line) // 2] for line in lines]
        generated = model.generate_until([request(prompt, settings) for prompt in prompts])
        assert generated == [plain.continuation(prompt, ["\n", "e"], 12, loops) for prompt in prompts]
    assert len(seen) > 2 * len(pairs)  # they depend on T
    assert model.cut > 0
    (alone,) = model.loglikelihood([request("", " x")])
    first = plain.bos or [plain.tokenizer.eos]
    ids = plain.tokenizer.encode(" x")
    assert alone[0] == pytest.approx(plain.score([*first, *ids], len(ids), LOOPS[-1])[0], abs=1e-4)


def test_scores_of_every_t_take_one_pass(run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(run)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *given, **named: calls.append(1) or forward(*given, **named))
    lm = HarnessModel(model, tokenizer, LOOPS, LENGTH, batch_size=100)
    for lm.loops in LOOPS:
        lm.loglikelihood([request(line, " x") for line in lines])
    assert len(calls) == 1


def test_repeated_requests_draw_different_tokens(run: Path) -> None:
    model, tokenizer = load(run)
    lm = HarnessModel(model, tokenizer, [2], LENGTH, batch_size=3)
    settings = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    texts = lm.generate_until([request("import", settings)] * 5)
    assert len(set(texts)) > 1
    assert texts == lm.generate_until([request("import", settings)] * 5)
    assert harness_model.read_generation(settings)["temperature"] == 1
    assert harness_model.read_generation({"temperature": 0.7, "do_sample": False})["temperature"] == 0
    with pytest.raises(ConfigError, match="generation_kwargs have num_beams"):
        harness_model.read_generation({"num_beams": 3})


def test_what_cannot_be_scored_is_an_error(run: Path) -> None:
    model, tokenizer = load(run)
    lm = HarnessModel(model, tokenizer, [2], LENGTH, batch_size=3)
    with pytest.raises(ConfigError, match="adds no token to its context"):
        lm._loglikelihood_tokens([(("a b", ""), [5, 6], [])])
    with pytest.raises(ConfigError, match="a continuation has 33 tokens, the context 32"):
        lm._loglikelihood_tokens([(("a", "b"), [5], [6] * 33)])
    unknown = tokenizer.processor.unk_id()
    lm._loglikelihood_tokens([(("a", "b"), [5], [6]), (("a", "b"), [5], [unknown]), (("a", "b"), [unknown], [6])])
    assert (lm.unknown, lm.cut) == (2, 0)


def test_the_files_equal_what_lm_eval_computes_from_plain_answers(
    run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--harness=lines,lines_text,lines_more", f"--harness_path={tasks}", "--loops=6,1,6"]
    assert evaluate(words) == 0
    said = capsys.readouterr()
    result = json.loads((run / "eval-harness.json").read_text())
    assert read_harness_scores(run / "eval-harness.json") == result
    assert (result["checkpoint"], result["step"], result["limit"]) == ("step-00000008", 8, None)
    assert result["cut_requests"] > 0
    assert result["unknown_requests"] == 0
    rows = [json.loads(line) for line in (tasks / "lines.jsonl").read_text().splitlines()]
    found = {(row["task"], row["metric"], row["loops"]): row for row in result["scores"]}
    plain = Plain(run)
    for loops in (1, 6):
        ends = [plain.loglikelihood(row["begin"], " " + row["end"], loops) for row in rows]
        assert found["lines_end", "perplexity", loops]["value"] == pytest.approx(
            math.exp(-sum(score for score, _ in ends) / len(ends)), rel=1e-4
        )
        texts = [plain.rolling(row["text"], loops) for row in rows]
        size = sum(len(row["text"].encode()) for row in rows)
        assert found["lines_text", "bits_per_byte", loops]["value"] == pytest.approx(-sum(texts) / size / math.log(2))
        right = 0
        for row in rows:
            scores = [plain.loglikelihood(row["begin"], " " + choice, loops)[0] for choice in row["choices"]]
            right += scores.index(max(scores)) == row["answer"]
        choice = found["lines_choice", "acc", loops]
        assert choice["value"] == right / len(rows)
        assert choice["standard_error"] == pytest.approx(
            math.sqrt(right * (len(rows) - right) / (len(rows) - 1)) / len(rows)
        )
        whole = found["lines", "acc", loops]
        assert whole["value"] == pytest.approx((choice["value"] + found["lines_end", "acc", loops]["value"]) / 2)
        assert (choice["examples"], whole["examples"]) == (len(rows), 2 * len(rows))
        continued = [plain.continuation(row["begin"], ["\n", ")"], 12, loops) for row in rows]
        exact = [text == row["end"] for text, row in zip(continued, rows)]
        assert found["lines_more", "exact_match", loops]["value"] == sum(exact) / len(rows)
    assert found["lines_end", "perplexity", 1]["value"] != found["lines_end", "perplexity", 6]["value"]
    assert {row["loops"] for row in result["scores"]} == {1, 6}
    assert "perplexity (lower is better)" in said.out
    assert "it/s" not in said.err
    assert ("lines_choice", "acc") not in {(row["task"], row["metric"]) for row in find_drawn_rows(result)}
    assert {row["task"] for row in find_drawn_rows(result)} == {"lines", "lines_end", "lines_text", "lines_more"}
    assert matplotlib.image.imread(run / "eval-harness.png").shape[2] == 4
    events = EventAccumulator(str(run / "tensorboard" / "eval-harness"))
    events.Reload()
    assert events.Scalars("harness/lines/acc_T6")[0].value == pytest.approx(found["lines", "acc", 6]["value"])
    page = write_report(run).read_text()
    assert "<td>lines_text</td><td>bits_per_byte (lower is better)</td>" in page
    assert "data:image/png" in page
    assert (run / "report" / "harness.png").is_file()
    drop_records_after(run, 7)
    assert not [*run.glob("eval-harness*"), *run.glob("tensorboard/eval-harness")]


def test_examples_and_limit_are_those_of_lm_eval(run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[str]] = []
    score = HarnessModel.loglikelihood

    def record(self: Any, requests: Any, **named: Any) -> Any:
        prompts.append([request.args[0] for request in requests])
        return score(self, requests, **named)

    monkeypatch.setattr(HarnessModel, "loglikelihood", record)
    result = evaluate_harness(str(run), [1, 2], ["lines_end"], path=str(tasks), limit=3, fewshot=2, length=128)
    assert {row["examples"] for row in result["scores"]} == {3}
    assert (result["limit"], result["fewshot"], result["sequence_length"]) == (3, 2, 128)
    assert prompts[0] == prompts[1]  # the same examples at every T
    assert all(prompt.count("\n\n") == 2 for prompt in prompts[0])


def test_a_better_result_of_a_run_is_kept(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, file = run / "checkpoints" / "step-00000006", run / "eval-harness.json"
    for checkpoint, loops, names, limit, reason in (
        (older, [1], ["lines"], 0, ""),
        (run, [1], ["lines_end"], 3, ""),
        (run, [1, 2], ["lines"], 4, ""),
        (older, [1, 2], ["lines"], 4, "step 8 and is kept"),
        (run, [1, 2], ["lines"], 3, "this step with more examples, tasks or T"),
        (run, [1, 2], ["lines_end"], 4, "this step with more examples, tasks or T"),
        (run, [1], ["lines"], 4, "this step with more examples, tasks or T"),
        (run, [2, 1], ["lines"], 0, ""),
    ):
        before = file.read_bytes() if file.exists() else b""
        result = evaluate_harness(str(checkpoint), loops, names, path=str(tasks), limit=limit)
        assert (file.read_bytes() == before) == bool(reason)
        assert reason or read_harness_scores(file)["step"] == result["step"]
        assert (f"{file} is of {reason}" in capsys.readouterr().out) == bool(reason)


def test_a_folder_that_was_exported(run: Path, tasks: Path, tmp_path: Path) -> None:
    from launch.commands.convert import convert

    assert convert([str(run), str(tmp_path / "export"), "--to", "hf"]) == 0
    out = tmp_path / "scores.json"
    given = ["--harness=lines_*", f"--harness_path={tasks}", "--loops=2", "--limit=4"]
    assert evaluate([str(tmp_path / "export"), *given, f"--out={out}"]) == 0
    assert evaluate([str(run), *given]) == 0
    ours, theirs = (json.loads(file.read_text()) for file in (run / "eval-harness.json", out))
    assert theirs["step"] is None
    assert theirs["scores"] == [
        row
        | {"value": pytest.approx(row["value"]), "standard_error": pytest.approx(row["standard_error"], nan_ok=True)}
        for row in ours["scores"]
    ]
    assert out.with_suffix(".png").is_file()
    file = tmp_path / "export" / "config.json"
    settings = json.loads(file.read_text())
    for length in (None, "128", 0):
        file.write_text(json.dumps(settings | {"max_position_embeddings": length}))
        with pytest.raises(CheckpointError, match="max_position_embeddings"):
            evaluate([str(tmp_path / "export"), *given, f"--out={out}"])
    file.write_text(json.dumps(settings | {"exit": "change", "exit_threshold": 0.1}))
    with pytest.raises(ConfigError, match=r"has exit 'change' in its config\.json.* Run lm_eval on it"):
        evaluate([str(tmp_path / "export"), *given, f"--out={out}"])


def test_what_cannot_be_run_is_refused_before_work(
    run: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("ran first")

    monkeypatch.setattr(harness, "score_harness_tasks", never)
    folder, path = Path(shutil.copytree(tasks, tmp_path / "tasks")), str(tmp_path / "tasks")

    def refuse(message: str, *names: str, kind: type = ConfigError, **settings: Any) -> None:
        with pytest.raises(kind, match=message):
            evaluate_harness(str(run), [1], names, path=path, **settings)

    refuse(r"lines_chioce is no task of lm_eval nor in .*tasks. Did you mean lines_choice", "lines_chioce")
    refuse("uplicate task 'lines_end'.*only one", "lines", "lines_end")
    refuse("lines_more generates up to 12 tokens.*context of 12.*--sequence_length 24", "lines_more", length=12)
    (tmp_path / "mine.json").write_text('{"scores": []}')
    refuse("is not an evaluation", "lines_end", out=str(tmp_path / "mine.json"))
    (tmp_path / "holiday.png").write_bytes(b"kept")
    refuse(r"holiday\.png exists and is no picture of", "lines_end", out=str(tmp_path / "holiday.json"))
    for name, changes, message in (
        ("runs_code", {"unsafe_code": True}, "runs_code runs the programs that the model writes"),
        ("other_metric", {"metric_list": [{"metric": "meteor", "hf_evaluate": True}]}, "computes meteor with a script"),
        ("beams", {"generation_kwargs": {"num_beams": 2}}, "have num_beams"),
        ("images", {"doc_to_image": "begin"}, "images has images or sound"),
        (
            "absent",
            {"dataset_kwargs": {"data_files": {"test": str(folder / "absent.jsonl")}}},
            "absent cannot be loaded",
        ),
    ):
        task = json.loads((folder / "lines_more.yaml").read_text()) | {"task": name} | changes
        (folder / f"{name}.yaml").write_text(json.dumps(task))
        refuse(message, name, kind=DataError if name == "absent" else ConfigError)
    for words, message in (
        (["--harness=lines_end", "--loops=0"], "at least 1"),
        (["--harness=lines_end", "--tasks"], "two evaluations"),
        (["--harness=lines_end", "--data=x"], "Omit --data"),
        (["--harness=lines_end", "--limit=-1"], "at least 0"),
        (["--harness=lines_end", "--harness_path=nowhere"], "is not a folder"),
        (["--limit=3"], "for --harness"),
        (["--harness=lines_end", "--exit_rules=change:0.1"], "Export the checkpoint .*exit=RULE,exit_threshold=E"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate([str(run), *words])


def test_the_tasks_of_lm_eval_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    manager, names = harness.find_tasks(["arc_easy", "arc_*", "arc_easy"])
    assert names[0] == "arc_easy"
    assert {"arc_challenge", "arc_easy"} <= set(names)
    assert len(names) == len(set(names))
    assert "mmlu" in manager.all_groups


def test_without_lm_eval_a_sentence_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed. Install it: pip install 'megatron-rdt\[harness\]'"):
        evaluate_harness(str(run), [1], ["lines_end"])
