"""Read a run, damage it, resume it."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.train.trainer import train

Configure = Callable[..., RunConfig]


def checkpoint_path(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_all_names(run: Path) -> list[str]:
    """Every name below checkpoints/, hidden ones included."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def list_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, the one to continue from last."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints.list_complete_checkpoints(run)]


def read_losses(run: Path) -> dict[int, float]:
    """Loss of every recorded step; each step is recorded once."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record["loss"] for record in records}


def flip_bit(path: Path, position: int | None = None) -> None:
    """Flip one bit of the byte at `position`, or of the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def resume_run(run: Path, configure: Configure, *words: str, resume: str = "auto") -> int:
    """Train the run further with these options; return the exit status."""
    return train(configure(f"--run.root={run.parent}", f"--run.name={run.name}", "--eval.every=0", *words), resume)
