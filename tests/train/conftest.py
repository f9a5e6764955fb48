"""A finished run that several files of tests resume from."""

from pathlib import Path

import pytest

from megatron_rdt.train import trainer
from tests.train.runs import Configure


@pytest.fixture(scope="session")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4; read only."""
    root = tmp_path_factory.mktemp("finished")
    assert trainer.train(configure(f"--run.root={root}", "--run.name=first", "--train.steps=4", "--eval.every=0")) == 0
    return root / "first"
