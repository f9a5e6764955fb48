"""Names inside a run directory, `runs/<name>`; without PyTorch, for commands that must start fast."""

from pathlib import Path
from typing import Literal

from megatron_rdt.config import RunConfig

CHECKPOINTS = "checkpoints"
WeightKind = Literal["model", "ema"]  # folders of a checkpoint: the weights, and their average (`optimizer.ema`)
LATEST = "latest"  # a file: the name of the newest checkpoint
TENSORBOARD = "tensorboard"
HANG = "hang"  # of each rank, before a timeout ended the run
TRACES = "traces"  # of torch.profiler
LOCK = ".lock"  # held by rank 0 while it lives
FAILURE = "failure.json"  # when and why the last start ended, if with an error
JOBS = "jobs.jsonl"  # Slurm jobs that were submitted for the run
ORIGIN = "origin.json"  # the checkpoint of another run that this one began from


def run_directory_of(config: RunConfig) -> Path:
    """The directory of a run, `run.root`/`run.name`."""
    return Path(config.run.root) / config.run.name


def name_checkpoint(step: int) -> str:
    """Return the name of a step's directory below `CHECKPOINTS`."""
    return f"step-{step:08d}"
