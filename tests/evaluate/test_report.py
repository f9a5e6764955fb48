"""The report of a run: self-contained, with pictures, and with the numbers of the run's records."""

import base64
import html.parser
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest

from megatron_rdt.compare.pictures import draw_accuracy
from megatron_rdt.config import RunConfig
from megatron_rdt.depth import loop_probabilities
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.evaluate import plots
from megatron_rdt.evaluate.loss import Evaluation, evaluate_checkpoint
from megatron_rdt.evaluate.report import summarize, write_report
from megatron_rdt.train.trainer import train

pytestmark = pytest.mark.slow

PICTURES = ("loss", "loss_against_loops", "stability", "loop_histogram", "throughput")


@pytest.fixture(scope="module")
def finished(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reported")
    options = ["--train.micro_batch=4", "--sample.every=8", "--sample.tokens=4", "--sample.prompt=<b>&"]
    assert train(configure(f"--run.root={root}", *options)) == 0
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Page(html.parser.HTMLParser):
    """Collects the references that a browser would fetch, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        assert tag not in ("script", "link", "iframe", "object"), tag

    def handle_data(self, data: str) -> None:
        self.text += data


def records(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def edit_metrics(run: Path, edit: Callable[[dict], None]) -> None:
    changed = records(run)
    for record in changed:
        edit(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))


def test_an_earlier_report_stays_until_the_new_one_is_complete(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    edit_metrics(run, lambda record: record.update(loss=record["loss"] + 1))

    def run_out_of_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "join_pictures", run_out_of_space)
        with pytest.raises(OSError, match="No space"):
            write_report(run)
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before
    write_report(run)
    after = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    assert after.keys() == before.keys()
    assert after["loss.png"] != before["loss.png"]


def test_the_page_is_self_contained(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report" / "index.html"
    page = Page(path)
    assert len(page.references) == len(PICTURES)
    for name, reference in zip(PICTURES, page.references):
        prefix = "data:image/png;base64,"
        assert reference.startswith(prefix)
        assert base64.b64decode(reference.removeprefix(prefix)) == (run / "report" / f"{name}.png").read_bytes()
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|url\(|@import|//", re.sub(r"base64,[^\"]*", "", source))
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        ["index.html", "overview.png", *(f"{n}.png" for n in PICTURES)]
    )


def test_a_comparison_opens_the_page(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"other/accuracy\.png does not exist\. Name the directory of a finished `rdt compare`"
    ):
        write_report(run, tmp_path / "other")
    comparison = tmp_path / "words-compare"
    comparison.mkdir()
    picture = draw_accuracy(
        {"looped": [{"task": "t", "difficulty": 1, "loops": 1, "accuracy": 0.5, "trained": True}]},
        comparison / "accuracy.png",
    )
    page = Page(write_report(run, comparison, "A remark."))
    first = page.references[0]
    assert "equal operations in training. A remark." in page.text
    assert base64.b64decode(first.partition("base64,")[2]) == picture.read_bytes()


def test_the_pictures_show_something(run: Path) -> None:
    write_report(run)
    for name in PICTURES:
        image = matplotlib.image.imread(run / "report" / f"{name}.png")
        height, width = image.shape[:2]
        assert (width, height) == (840, 504)
        ink = (image[..., :3].min(-1) < 0.9).mean()
        assert 0.01 < ink < 0.6, name
        coloured = (image[..., :3].max(-1) - image[..., :3].min(-1) > 0.25).sum()
        assert coloured > 300, f"{name} has no curve in colour"


def test_the_summary_states_the_numbers_of_the_run(run: Path) -> None:
    evaluate_checkpoint(str(run), [1, 2, 4], 4)
    text = Page(write_report(run)).text
    metrics, evaluation = records(run), json.loads((run / "eval.json").read_text())
    assert f"{metrics[-1]['step']} steps, {4 * 32 * 8:,} tokens" in text
    assert f"the last training loss is {metrics[-1]['loss']:.3f}." in text
    assert f"The largest spectral radius of the injection was {max(r['spectral_radius'] for r in metrics):.4f}." in text
    losses = evaluation["losses"]
    best = min(losses, key=lambda t: losses[t])
    assert f"The lowest validation loss is {losses[best]:.3f}, at T = {best}" in text
    if best == "1":
        assert "more loops did not help here" in text
    else:
        assert f"{losses['1'] - losses[best]:.3f} nats below T = 1." in text
    for t, loss in losses.items():
        assert f"{t}{loss:.4f}{math.exp(loss):.2f}" in text, "the row of the table"
    assert all(sentence in text for sentence in evaluation["summary"])
    assert "<b>&" in text, "the prompt is shown as text, not as markup"
    assert "model.dim32" in text
    assert "after step 8" in text


def test_the_summary_tells_a_gain_from_none() -> None:
    last = {"step": 1, "tokens": 2, "loss": 3.0, "grad_norm": 1.0, "spectral_radius": 0.5}

    def describe(losses: dict[int, float]) -> list[str]:
        return summarize([last], Evaluation(1, losses, {}, []))

    assert "at T = 4, 0.250 nats below T = 1." in describe({1: 3.0, 4: 2.75, 8: 2.8})[-1]
    assert "at T = 1: more loops did not help here." in describe({1: 2.5, 4: 2.75})[-1]
    assert not any("validation" in sentence for sentence in describe({4: 2.75}))
    assert summarize([last], Evaluation(1, {1: 2.5, 4: 2.75}, {}, ["More loops hurt."]))[-1] == "More loops hurt."


def test_the_evaluation_of_the_latest_step_is_shown(run: Path) -> None:
    inside = records(run, "eval.jsonl")[-1]["losses"]
    text = Page(write_report(run)).text
    assert f"3{inside['3']:.4f}" in text
    # An evaluation of an older checkpoint does not pass for the final model's.
    evaluate_checkpoint(str(run / "checkpoints/step-00000004"), [1, 2], 4)
    assert Page(write_report(run)).text == text
    # One of the last checkpoint, with more loop counts, is preferred.
    losses = evaluate_checkpoint(str(run), [1, 2, 7], 4)["losses"]
    assert f"7{losses['7']:.4f}" in Page(write_report(run)).text


def test_a_run_with_bad_steps_still_has_a_report(run: Path) -> None:
    def spoil(record: dict) -> None:
        if record["step"] >= 7:
            record.update(loss=None, grad_norm=None, state_norm=None, spectral_radius=None)

    edit_metrics(run, spoil)
    with open(run / "eval.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 8, "tokens": 1, "losses": {"1": None, "3": 2.0}}) + "\n")
    text = Page(write_report(run)).text
    assert f"the last training loss is {records(run)[5]['loss']:.3f}." in text
    assert "not finite: 2." in text
    edit_metrics(run, lambda record: record.update(loss=None, spectral_radius=None))
    assert "no training loss was finite" in Page(write_report(run)).text


def test_a_killed_run_without_evaluations_has_a_report(run: Path) -> None:
    for name in ("eval.jsonl", "samples.jsonl"):
        (run / name).unlink()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "tok')
    path = write_report(run)
    assert len(Page(path).references) == len(PICTURES) - 1
    assert not (path.parent / "loss_against_loops.png").exists()


def test_a_directory_without_metrics_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not exist"):
        write_report(tmp_path / "absent")
    with pytest.raises(DataError, match=r"config\.yaml is a file"):
        write_report(run / "config.yaml")
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        write_report(run)
    assert not (run / "report").exists()


@pytest.mark.parametrize("line", [b"null", b"[]", b"3", b'{"step": 9}'])
def test_an_invalid_record_is_named(line: bytes, run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\x00\n" + line + b"\n")  # the first line is one that a crash may leave
    with pytest.raises(DataError, match=r"metrics\.jsonl:10 is not a record"):
        write_report(run)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"{", b'{"step": 3}', b'{"step": 3, "losses": {"a": 1}}'])
def test_an_invalid_evaluation_is_named(content: bytes, run: Path) -> None:
    (run / "eval.json").write_bytes(content)
    with pytest.raises(DataError, match=r"eval\.json is not an evaluation"):
        write_report(run)


def test_any_number_of_loop_counts_is_drawn(tmp_path: Path, configure: Callable[..., RunConfig]) -> None:
    """With more curves than colours, all of them are drawn and in the legend."""
    metrics = [{"step": s, "loss": 3.0, "loops_max": 1 + s % 12, "tokens_per_second": 1.0} for s in range(1, 40)]
    losses = [{str(t): 2 + t / 10 + 1 / s for t in range(1, 11)} for s in (10, 20)]
    few = plots.draw_loss_curve(metrics, [{"step": 10, "losses": {"1": 2.5}}], tmp_path / "few.png")
    many = plots.draw_loss_curve(
        metrics, [{"step": 10 * i, "losses": v} for i, v in enumerate(losses, 1)], tmp_path / "m.png"
    )
    ink = [(matplotlib.image.imread(path)[..., :3].min(-1) < 0.9).mean() for path in (few, many)]
    assert ink[1] > 2 * ink[0]
    # Draws beyond the configured maximum, of a run whose config changed on the way, are drawn too.
    table = loop_probabilities(configure().depth)
    assert len(table) == 7
    plots.draw_loop_histogram(metrics, table, tmp_path / "histogram.png")


def test_the_state_over_iterations_is_drawn_where_it_was_recorded(run: Path) -> None:
    def add(record: dict) -> None:
        if record["step"] % 2 == 0:
            norms = [1.0 + t / 4 for t in range(record["step"])]
            residuals = [0.5**t for t in range(record["step"])]
            record["iterations"] = {"state_norm": norms, "state_residual": [None, *residuals[1:]]}

    edit_metrics(run, add)
    page = Page(write_report(run))
    assert len(page.references) == len(PICTURES) + 1
    image = matplotlib.image.imread(run / "report" / "iterations.png")
    assert image.shape[:2] == (504, 840)
    coloured = image[..., :3].max(-1) - image[..., :3].min(-1) > 0.25
    assert min(coloured[:, :420].sum(), coloured[:, 420:].sum()) > 300, "a curve in each half"


@pytest.mark.parametrize("value", ["<script>alert(1)</script>", None, 1.5, [1]])
@pytest.mark.parametrize("file", ["samples.jsonl", "metrics.jsonl", "eval.jsonl"])
def test_a_record_with_another_value_than_a_step_is_named(file: str, value: object, run: Path) -> None:
    lines = (run / file).read_text().splitlines()
    (run / file).write_text("\n".join([*lines, json.dumps({**json.loads(lines[-1]), "step": value})]) + "\n")
    with pytest.raises(DataError, match=rf"{file}:{len(lines) + 1} is not a record of a run: its step is"):
        write_report(run)


def test_a_report_is_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    (run / "report").symlink_to(tmp_path / "site")
    with pytest.raises(DataError, match="report is a link"):
        write_report(run)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"
    (run / "eval.json").symlink_to(tmp_path / "site" / "index.html")
    with pytest.raises(ConfigError, match=r"eval.json is a link, .* --out"):
        evaluate_checkpoint(str(run), [1], 2)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"
