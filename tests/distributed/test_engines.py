"""Every engine on two processes equals one process: loss, norm and every gradient. It trains under real launchers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local_processes import find_free_port
from tests.checkpoint.runs import read_losses
from tests.distributed.engine_worker import check_engine
from tests.distributed.processes import run_on_processes
from tests.distributed.training import train_on

BIN = Path(sys.executable).parent


def start(launcher: str, arguments: list[str], repository: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    port = str(find_free_port())
    if launcher == "torchrun":
        command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", port]
    else:
        command = [BIN / "deepspeed", "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(repository),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    return subprocess.run(
        [*map(str, command), *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_engine_equals_one_process(engine: str) -> None:
    verdict = run_on_processes(check_engine, 2, engine, "plain", timeout=170)[0]
    assert verdict["world_size"] == 2
    for size in (6, 2):
        differences = verdict[f"differences_{size}"]
        assert len(differences) > 30  # every parameter, the norm and the loss
        wrong = {name: value for name, value in differences.items() if not value < 3e-4}
        assert not wrong
        assert differences["loss"] < 1e-5
        assert verdict[f"discard_{size}"] < 3e-4
    assert verdict["bfloat16"]["loss"] < 1e-3
    assert verdict["bfloat16"]["gradient"] < 0.03


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_an_exit_gate_equals_one_process(engine: str) -> None:
    """Ranks of different T read different numbers of iterations out, and complete gradients in another order."""
    differences = run_on_processes(check_engine, 2, engine, "gate", timeout=170)[0]["differences_2"]
    assert len(differences) > 30
    assert not {name: value for name, value in differences.items() if not value < 3e-4}
    assert differences["loss"] < 1e-5


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("launcher", "engine"), [("torchrun", "fsdp"), ("deepspeed", "zero3")])
def test_every_launcher_gives_the_same_losses(
    launcher: str, engine: str, tmp_path: Path, repository: Path, tiny_options: list[str]
) -> None:
    assert shutil.which(str(BIN / launcher))
    options = [*tiny_options, f"--run.root={tmp_path}", f"--parallel.engine={engine}"]
    result = start(launcher, [str(repository / "launch" / "pretrain.py"), *options, "--run.name=r"], repository, 190)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "done: 8 steps" in result.stdout
    train_on(2, [*options, "--run.name=plain"])
    assert len(read_losses(tmp_path / "r")) == 8
    assert read_losses(tmp_path / "r") == read_losses(tmp_path / "plain")
