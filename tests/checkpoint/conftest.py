"""A finished run with all of its checkpoints, and copies of it to damage."""

import shutil
from pathlib import Path

import pytest

from megatron_rdt.train.trainer import train
from tests.checkpoint.runs import Configure


@pytest.fixture(scope="session")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 2, 4, 6 and 8. Read only: use `run` to change something."""
    root = tmp_path_factory.mktemp("finished")
    assert train(configure(f"--run.root={root}", "--run.name=r", "--checkpoint.keep=0", "--eval.every=0")) == 0
    return root / "r"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "r"))
