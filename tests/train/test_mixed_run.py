"""A run whose sequences have different T: the loop counts in its records and in its report."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from megatron_rdt.config import RunConfig
from megatron_rdt.depth import DepthSampler
from megatron_rdt.evaluate.plots import compute_loop_shares
from megatron_rdt.evaluate.report import write_report
from megatron_rdt.train.trainer import train
from tests.train.runs import read_records

pytestmark = pytest.mark.slow

OPTIONS = ["--train.global_batch=8", "--train.micro_batch=2", "--depth.backprop=2", "--eval.every=0"]


@pytest.mark.parametrize("per", ["sequence", "micro_batch", "step"])
def test_records_hold_the_loops_that_were_run(
    per: str, configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(f"--run.root={tmp_path}", f"--depth.per={per}", "--logging.tensorboard=true", *OPTIONS)
    plans: list[tuple[int, ...]] = []
    plan = DepthSampler.plan

    def noted(*arguments: object) -> object:
        made = plan(*arguments)  # type: ignore[arg-type]
        plans.append(made.iterations)
        return made

    monkeypatch.setattr(DepthSampler, "plan", noted)
    assert train(config) == 0
    found = read_records(tmp_path / "run" / "metrics.jsonl")
    assert len(plans) == 4 * len(found) == 32
    for index, record in enumerate(found):
        loops = sum(plans[4 * index : 4 * index + 4], ())
        assert record["loops_mean"] == pytest.approx(sum(loops) / 8)
        assert record["loops_max"] == max(loops)
        assert record["loops_with_grad"] == pytest.approx(sum(min(t, 2) for t in loops) / 8)
        counts = {str(t): n for t, n in sorted(Counter(loops).items())}
        assert record.get("loops_counts", counts) == counts
        assert ("loops_counts" in record) == (len(counts) > 1)
    assert any("loops_counts" in record for record in found) == (per != "step")
    shares = compute_loop_shares(found)
    everything = Counter(t for loops in plans for t in loops)
    assert list(shares) == pytest.approx([everything[t] / 64 for t in range(max(everything) + 1)])
    heights: list[float] = []
    bar = Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda self, x, height, **words: (heights.extend(height), bar(self, x, height, **words))
    )
    write_report(tmp_path / "run")
    assert heights[: len(shares) - 1] == pytest.approx(list(shares[1:]))
    assert sum(heights) == pytest.approx(1)
