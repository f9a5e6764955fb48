"""The loss against T: paired differences, the fit, and sentences that claim no more than was measured."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from megatron_rdt.evaluate.loop_curve import LoopCurve, fit_exponential
from megatron_rdt.evaluate.row_scores import RowScores

LOOPS = (1, 2, 4, 8, 16)


def make_curve(offsets: dict[int, float], rows: int = 64, noise: float = 0.01, seed: int = 0) -> LoopCurve:
    """Windows of 10 targets that differ by 1 nat and more, each with the offset of T and a little noise of its own."""
    generator = np.random.default_rng(seed)
    windows = 3 + generator.normal(0, 1, rows)
    targets = torch.full((rows,), 10.0, dtype=torch.float64)
    return LoopCurve(
        {
            t: {
                "text": RowScores(
                    10 * torch.from_numpy(windows + offset + generator.normal(0, noise, rows)), targets, targets
                )
            }
            for t, offset in offsets.items()
        },
        {"text": 1.0},
    )


def test_differences_are_of_the_same_windows() -> None:
    curve = make_curve({1: 0.0, 4: -0.02})
    losses = {t: curve.scores[t]["text"].losses / 10 for t in (1, 4)}
    difference, error = curve.compare(1, 4)
    each = losses[1] - losses[4]
    assert difference == pytest.approx(float(each.mean()))
    assert error == pytest.approx(float(each.std() / 8))
    # The error of a loss is that of the windows, which differ much more than their differences do.
    assert curve.standard_errors[1] == pytest.approx(float(losses[1].std() / 8))
    assert curve.standard_errors[1] > 20 * error
    assert curve.losses[4] == pytest.approx(float(losses[4].mean()))


def test_corpora_are_weighted_and_their_errors_independent() -> None:
    parts = [make_curve({1: 0.0, 2: -0.1}, seed=seed) for seed in (1, 2)]
    shares = {"a": 0.75, "b": 0.25}
    scores = {t: {name: part.scores[t]["text"] for name, part in zip(shares, parts)} for t in (1, 2)}
    curve = LoopCurve(scores, shares)
    assert curve.losses[1] == pytest.approx(0.75 * parts[0].losses[1] + 0.25 * parts[1].losses[1])
    (da, ea), (db, eb) = (part.compare(1, 2) for part in parts)
    assert curve.compare(1, 2) == pytest.approx((0.75 * da + 0.25 * db, math.hypot(0.75 * ea, 0.25 * eb)))
    assert curve.by_corpus["b"][2] == pytest.approx(parts[1].losses[2])


def test_a_gain_is_told_from_noise() -> None:
    pays = make_curve({1: 0.0, 2: -0.05, 4: -0.1, 8: -0.1001, 16: -0.02}).summarize()
    assert pays["gain"]["loops"] == 1
    assert pays["gain"]["best_loops"] in (4, 8)
    assert pays["gain"]["significant"]
    assert pays["summary"][0].startswith(f"More loops pay: the loss at T = {pays['gain']['best_loops']} is 0.")
    assert pays["overthinking"]["significant"]
    assert pays["overthinking"]["loops"] == 16
    assert pays["summary"][1].startswith("Too many loops hurt: at T = 16 the loss is 0.")
    flat = make_curve(dict.fromkeys(LOOPS, 0.0), noise=0.05).summarize()
    assert not flat["gain"]["significant"] or flat["gain"]["difference"] > 0.01
    assert any(text in flat["summary"][0] for text in ("bought nothing",))
    hurts = make_curve({1: 0.0, 2: 0.1, 4: 0.2}).summarize()
    assert hurts["summary"][0] == "More loops bought nothing: the lowest loss is at T = 1, the smallest."
    assert hurts["overthinking"]["difference"] == pytest.approx(0.2, abs=0.01)


def test_the_fit_equals_a_nonlinear_one() -> None:
    generator = np.random.default_rng(0)
    losses = {t: 3.7 + 0.8 * math.exp(-t / 3.3) + generator.normal(0, 0.003) for t in (1, 2, 3, 4, 6, 8, 12, 16)}
    fit = fit_exponential(losses)
    assert fit is not None
    loops, values = np.array(list(losses)), np.array(list(losses.values()))
    reference, _ = curve_fit(lambda t, a, b, c: a + b * np.exp(-t / c), loops, values, p0=(3, 1, 2))
    assert (fit.limit, fit.amplitude, fit.tau) == pytest.approx(tuple(reference), rel=2e-3)
    assert fit.r2 > 0.99
    assert fit.objection == ""


@pytest.mark.parametrize(
    ("loss", "objection"),
    [
        (lambda t: 3 + 0.1 * math.log(t), "does not fall"),
        (lambda t: 3 - 0.01 * t, "not begun to level off"),
        (lambda t: 3 + (t == 1), "between the two smallest T"),
        (lambda t: 3 + 0.1 * (t in (1, 4)), "explains only"),
        (lambda t: 3.0, ""),
    ],
)
def test_a_fit_that_means_nothing_says_so(loss: Callable[[int], float], objection: str) -> None:
    fit = fit_exponential({t: loss(t) for t in LOOPS})
    assert fit is not None
    assert objection in fit.objection
    assert fit.objection


def test_few_or_infinite_losses_have_no_fit() -> None:
    assert fit_exponential({1: 3.0, 2: 2.0, 4: 1.5}) is None
    assert fit_exponential({1: 3.0, 2: 2.0, 4: 1.5, 8: math.nan}) is None
    assert make_curve({1: math.nan, 2: math.nan}).summarize() == {}
    assert make_curve({1: 0.0}).summarize() == {}
    assert "it takes four values of T" in make_curve({1: 0.0, 2: -0.1}).summarize()["summary"][-1]


def test_the_summary_is_json(tmp_path: Path) -> None:
    summary = make_curve({t: math.exp(-t) for t in LOOPS}).summarize()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["fit"]["tau"] == pytest.approx(1, abs=0.1)
    assert make_curve({1: 0.0, 2: -1.0}, rows=1).summarize()["gain"]["significant"] is False
