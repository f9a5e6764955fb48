"""Short runs of `configs/smoke.yaml` on the CPU, with more steps, on the corpus of the quickstart."""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.cli import run_command
from megatron_rdt.config import load_config
from megatron_rdt.evaluate.report import read_records
from megatron_rdt.train.trainer import train
from tools.options import make_parser
from tools.processes import ROOT

SMOKE, SMOKE_DATA, DATA = ROOT / "configs" / "smoke.yaml", ROOT / "configs" / "smoke_data.yaml", "data/stdlib"


def make_run_parser(description: str | None, steps: int, **defaults: Any) -> argparse.ArgumentParser:
    """A parser as `make_parser` makes it, with --steps and --data of such runs."""
    parser = make_parser(description, **defaults)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of every run")
    parser.add_argument("--data", default=DATA, help="prepared text; the default is prepared if it is missing")
    return parser


def prepare_data(data: str) -> None:
    """Prepare the corpus of the quickstart if it is asked for and missing."""
    if data == DATA and not Path(DATA).exists():
        assert run_command(["prep", "--config", str(SMOKE_DATA)]) == 0


@contextlib.contextmanager
def train_briefly(seed: int, steps: int, data: str, choice: Mapping[str, object]) -> Iterator[Path]:
    """Train and yield the run's folder, which is deleted at the end of the block.

    Args:
        seed: of the run; runs of one seed have the same weights, batches and T.
        steps: after which the run is saved and evaluated.
        data: prepared text.
        choice: further options, by dotted name.
    """
    with tempfile.TemporaryDirectory() as root:
        fixed = {
            "run.root": root,
            "run.seed": seed,
            "train.steps": steps,
            "train.device": "cpu",
            "data.path": data,
            "eval.every": steps,
            "checkpoint.every": 0,
            "sample.every": 0,
            "logging.tensorboard": False,
        }
        config = load_config(SMOKE, {**fixed, **choice})
        with contextlib.redirect_stdout(io.StringIO()):
            status = train(config)
        assert status == 0, f"ended with status {status}"
        yield Path(root) / config.run.name


def read_last_losses(run: Path) -> dict[str, float]:
    """Return the validation loss by T of a run's last evaluation."""
    return read_records(run / "eval.jsonl", {})[-1]["losses"]
