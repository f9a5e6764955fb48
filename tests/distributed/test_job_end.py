"""A run in a Slurm job that sends no signal stops before the job's end by itself, and goes on to the same losses."""

import os
import time
from pathlib import Path

import pytest

from tests.checkpoint.runs import read_losses
from tests.distributed.launchers import ENDLESS, make_command, start_launcher
from tests.distributed.training import train_on

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Extends the job by some seconds until the run has recorded five steps, so that nothing here depends on their speed.
SQUEUE = """\
#!/bin/sh
if [ "$(wc -l < {metrics})" -ge 5 ]; then end=2000-01-01T00:00:00; else end=$(date -u -d "+6 seconds" +%Y-%m-%dT%H:%M:%S); fi
echo "41|$end"
"""


def test_a_run_stops_before_the_end_of_its_job(tmp_path: Path, tiny_options: list[str]) -> None:
    run = tmp_path / "runs" / "stopped"
    run.parent.mkdir()
    options = [*tiny_options, f"--run.root={run.parent}", "--parallel.engine=fsdp", "--schedule.name=constant"]
    program = tmp_path / "squeue"
    program.write_text(SQUEUE.format(metrics=run / "metrics.jsonl"))
    program.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41"}
    variables["SLURM_JOB_END_TIME"] = str(int(time.time()) + 20)
    command = make_command("rdt train", [*options, *ENDLESS, "--run.name=stopped", "--logging.every=1"])
    with start_launcher(command, tmp_path / "output", variables) as launched:
        assert launched.wait(200) == 75, launched.read_output()
        text = launched.read_output()
    last = max(read_losses(run))
    assert f"stopped on the coming end of its Slurm job at step {last}, saved; use --resume auto" in text
    assert (run / "latest").read_text().strip() == f"step-{last:08d}"
    assert text.count("this Slurm job ends in") == 1
    options += [*ENDLESS, f"--train.steps={last + 5}"]
    assert f"(step {last})" in train_on(2, [*options, "--run.name=stopped", "--resume=auto"])
    train_on(2, [*options, "--run.name=straight"])
    assert read_losses(run) == read_losses(run.with_name("straight"))
