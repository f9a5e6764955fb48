"""Pictures of a comparison: the order of their panels, the curves in them."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np

from megatron_rdt.compare.arms import build_arms, build_runs
from megatron_rdt.compare.pictures import _arrange_panels, average_curves, draw_accuracy, draw_accuracy_over_steps
from megatron_rdt.compare.results import read_result
from megatron_rdt.config import RunConfig
from megatron_rdt.evaluate.report import METRICS


def test_built_in_arms_are_columns_and_values_of_axes_rows() -> None:
    arms = ["looped+window=2", "looped+window=0", "untied+window=2", "untied+window=0"]
    assert _arrange_panels(arms) == [["looped+window=2", "untied+window=2"], ["looped+window=0", "untied+window=0"]]
    assert _arrange_panels(arms[:3]) == [["looped+window=2", "untied+window=2"], ["looped+window=0", None]]
    assert _arrange_panels(["looped", "unlooped", "untied"]) == [["looped", "unlooped", "untied"]]
    several = [f"looped+lr={n}" for n in range(6)]
    assert _arrange_panels(several) == [several[:4], [*several[4:], None, None]]


def test_a_panel_is_as_wide_as_its_loop_counts_and_an_empty_one_is_blank(tmp_path: Path) -> None:
    cells = [
        {"task": "t", "difficulty": d, "loops": t, "accuracy": 0.5, "trained": d == 1}
        for d in (1, 2)
        for t in (1, 2, 4)
    ]
    once = [cell for cell in cells if cell["loops"] == 1]
    wide = matplotlib.image.imread(draw_accuracy({"looped": cells}, tmp_path / "one.png"))
    both = matplotlib.image.imread(
        draw_accuracy({"looped+a=1": cells, "untied+a=1": once, "looped+a=2": cells}, tmp_path / "b.png")
    )
    assert both.shape[1] > wide.shape[1]
    assert both.shape[0] > 1.5 * wide.shape[0]
    white = (both[..., :3] == 1).all(axis=-1)
    height, width = white.shape
    # Below the untied panel there is nothing; the colour bar is further to the right.
    assert white[int(0.6 * height) :, int(0.62 * width) : int(0.78 * width)].mean() > 0.99


def test_a_mean_over_runs_is_of_the_steps_that_all_have() -> None:
    assert average_curves([{10: 0.25, 20: 0.5, 30: 1.0}, {20: 0.75, 10: 0.25}]) == {10: 0.25, 20: 0.625}
    assert average_curves([{10: 0.25}]) == {10: 0.25}
    assert average_curves([{10: 0.25}, {}]) == average_curves([]) == {}


def test_accuracy_over_steps_is_read_at_the_loops_of_the_arm(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configure("--depth.scheme=fixed", "--depth.mean=4")
    arms, _ = build_arms(config, ["looped", "unlooped"])
    results = {}
    for run in build_runs(config, arms, 1, tmp_path):
        run.directory.mkdir(parents=True)
        (run.directory / "metrics.jsonl").write_text(json.dumps(dict.fromkeys(METRICS, 1)) + "\n")
        cells = [{"task": "t", "difficulty": d, "loops": t, "accuracy": t / 8} for d in (1, 2) for t in (1, 4, 8)]
        records = [{"step": step, "losses": {}, "tasks": cells} for step in (5, 10)]
        lines = [json.dumps(record) + "\n" for record in [{"step": 1, "losses": {}}, *records]]
        (run.directory / "eval.jsonl").write_text("".join(lines))
        results[run.arm] = [read_result(run, None, None)]
    found = {
        arm: [(r["step"], r["difficulty"], r["loops"]) for r in runs[0].accuracies] for arm, runs in results.items()
    }
    assert found["looped"] == [(5, 1, 4), (5, 2, 4), (10, 1, 4), (10, 2, 4)]
    assert {loops for *_, loops in found["unlooped"]} == {1}
    picture = matplotlib.image.imread(draw_accuracy_over_steps(results, tmp_path / "a.png"))[..., :3]
    blue, vermilion = (np.array(rgb) / 255 for rgb in ((0, 114, 178), (213, 94, 0)))
    rows = [np.nonzero((np.abs(picture - colour) < 0.02).all(-1).sum(1) > 40)[0].mean() for colour in (blue, vermilion)]
    assert rows[0] < rows[1], "the looped arm's curve is above the other's"
