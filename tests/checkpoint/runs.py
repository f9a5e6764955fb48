"""What tests read of a run, damage in it, and go on from."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.train.trainer import train

Configure = Callable[..., RunConfig]


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def names(run: Path) -> list[str]:
    """Everything below checkpoints/, hidden names included."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def order(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints.list_complete_checkpoints(run)]


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record["loss"] for record in records}


def flip(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def restart(run: Path, configure: Configure, *words: str, resume: str = "auto") -> int:
    return train(configure(f"--run.root={run.parent}", f"--run.name={run.name}", "--eval.every=0", *words), resume)
