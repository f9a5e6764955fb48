"""Save a run's checkpoints and restore the run from one: what the trainer adds to `megatron_rdt.checkpoint`.

The life of a resume: `checkpoint/choose.py` has picked a verified checkpoint, `RunCheckpoints.restore` compares it with
the config and the data, loads the engine, and returns the position; the trainer continues from there.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig, dump_config, load_config
from megatron_rdt.parallel import Engine
from megatron_rdt.train.data import TrainingData
from megatron_rdt.train.resume_checks import check_resumable, describe_changed_settings


@dataclass(frozen=True)
class Position:
    """The progress of a run.

    Attributes:
        step: optimizer steps done.
        samples: trained on, by all ranks together.
        skipped_steps: the last steps in a row that were not finite.
    """

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0


class RunCheckpoints:
    """The checkpoints of one run, saved and restored on every rank.

    Args:
        config: the run's config.
        run_directory: `runs/<name>`.
        engine: holds the weights and the optimizer state.
        data: knows its position by the number of samples.

    Attributes:
        saved_step: step of the last checkpoint that this process saved; None before the first.
    """

    def __init__(self, config: RunConfig, run_directory: Path, engine: Engine, data: TrainingData) -> None:
        self.config, self.run_directory, self.engine, self.data = config, run_directory, engine, data
        self.saved_step: int | None = None
        self._run_id = uuid.uuid4().hex
        self._parent: str | None = None

    def restore(self, source: Path) -> tuple[Position, list[str]]:
        """Restore engine and data from a verified checkpoint; return its position, and lines to print.

        Everything is compared before anything is loaded.

        Raises:
            CheckpointError: the checkpoint does not fit the config or the data.
        """
        state = checkpoints.read_trainer_state(source)
        check_resumable(source, state, self.config)
        changed_data = self.data.resume(source, state["data"])
        changed = describe_changed_settings(load_config(source / "config.yaml"), self.config)
        checkpoints.restore_engine(self.engine, source)
        # A run that starts from another run's checkpoint is a run of its own.
        if checkpoints.belongs_to_run(source, self.run_directory):
            self._run_id, self._parent = checkpoints.read_manifest(source)["run_id"], source.name
        lines = [f"resumed from {source} (step {state['step']})"]
        if changed:
            lines.append(f"changed since it was saved: {', '.join(changed)}")
        position = Position(state["step"], state["data"]["consumed_samples"], state["skipped_steps"])
        return position, [*lines, *changed_data]

    def save(self, position: Position) -> Path:
        """Save a checkpoint at this position and return its directory."""
        tokens = position.samples * self.config.train.sequence_length
        path = checkpoints.save_checkpoint(
            self.engine,
            self.run_directory,
            config_yaml=dump_config(self.config),
            trainer_state={
                "step": position.step,
                "tokens": tokens,
                "data": self.data.state(position.samples),
                "skipped_steps": position.skipped_steps,
            },
            facts={
                "run_id": self._run_id,
                "parent": self._parent,
                "tokens": tokens,
                "engine": self.config.parallel.engine,
                "world_size": self.engine.world_size,
            },
            tokenizer_directory=self.data.tokenizer_directory,
            keep=self.config.checkpoint.keep,
            rank_state=self.data.rank_state(position.samples),
        )
        self._parent, self.saved_step = path.name, position.step
        return path
