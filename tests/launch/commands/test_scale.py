"""`rdt scale`: its dry run trains nothing, it goes on after SIGKILL, and ends with a predicted run that was measured."""

import base64
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess, Popen

import pytest

from megatron_rdt.config import load_config
from tests.launch.commands.processes import find_processes, wait_until
from tests.train.runs import read_records

BUDGETS, LOOPS = ("3.3e8", "4.5e8", "6e8"), (1, 2, 4)


def is_finished(run: Path) -> bool:
    """Return True if a run has the checkpoint of its last step."""
    steps = load_config(run / "config.yaml").train.steps
    return (run / "checkpoints" / f"step-{steps:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_study_that_is_killed_goes_on_to_a_prediction_and_its_check(
    tiny_options: list[str],
    start: Callable[[list[str]], Popen[str]],
    forked_rdt: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    options = [f"--run.root={tmp_path}", "--run.name=budgets", "--model.dim=16", "--train.sequence_length=16"]
    options += ["--train.global_batch=2", "--eval.every=0", "--checkpoint.every=20", "--depth.scheme=poisson"]
    words = ["scale", *tiny_options, *options, "--budgets", ",".join(BUDGETS), "--loops=1,2,4", "--sequences=8"]
    folder = tmp_path / "budgets-scale"

    plan = forked_rdt(*words, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert len(re.findall(r"^C\S+\+dim16\+T", plan.stdout, re.MULTILINE)) == len(BUDGETS) * len(LOOPS)
    assert "then one run of 800M operations" in plan.stdout
    assert "9 runs, 0 of them finished" in plan.stdout
    assert not folder.exists()

    # Two runs at once, one thread each; killed in the middle of the third.
    process = start([*words, "--at_once=2"])
    wait_until(lambda: len(list(folder.glob("*/latest"))) > 2, 300)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    wait_until(lambda: not find_processes(tmp_path), 20)
    assert not (folder / "scale.json").exists()
    finished = [config.parent for config in folder.glob("*/config.yaml") if is_finished(config.parent)]
    begun = [latest.parent for latest in folder.glob("*/latest") if latest.parent not in finished]
    before = [(run / "train.log").read_bytes() for run in finished]
    assert finished
    assert begun

    result = forked_rdt(*words, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [(run / "train.log").read_bytes() for run in finished] == before, "a finished run is not trained again"
    assert all("resumed from" in (run / "train.log").read_text() for run in begun)
    document = json.loads((folder / "scale.json").read_text())
    assert [run["loss"] > 0 for run in document["runs"]] == [True] * 9
    for run in document["runs"]:
        assert len(read_records(folder / f"{run['arm']}-s1234" / "metrics.jsonl")) == run["steps"] >= 50
    assert [optimum["budget"] for optimum in document["optima"]] == [float(budget) for budget in BUDGETS]
    prediction = document["prediction"]
    assert prediction["budget"] == pytest.approx(6e8**2 / 4.5e8)
    assert prediction["loss"] == pytest.approx(prediction["predicted_loss"], rel=0.2)
    (larger,) = folder.glob("predicted+*")
    assert len(read_records(larger / "metrics.jsonl")) * 2 * 16 == prediction["tokens"]
    assert f"measured {prediction['loss']:.4f}" in result.stdout

    page = (folder / "index.html").read_text()
    assert f"measured {prediction['loss']:.4f}" in page
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (folder / "scale.png").read_bytes()

    logs = {log: log.read_bytes() for log in folder.glob("*/train.log")}
    assert len(logs) == 10
    again = forked_rdt(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {log: log.read_bytes() for log in folder.glob("*/train.log")} == logs
    assert "9 runs, 9 of them finished" in forked_rdt(*words, "--dry-run").stdout
