"""Write a checkpoint of weights alone, one tensor at a time, and read every one back.

The result is that of an engine of torch.distributed.checkpoint at step 0, without optimizer state: a new run begins
with it (`--init`), on any engine.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rdt.checkpoint import BUFFERS, HEALTH, make_health, software_versions, write_manifest
from megatron_rdt.checkpoint.restore import BEGINS_WITH_BOS, TRAINER_STATE
from megatron_rdt.config import RunConfig
from megatron_rdt.config.load import dump_config
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import save_with_torch, write_text
from megatron_rdt.locks import check_locks

Read = Callable[[str], Tensor]


@dataclasses.dataclass(frozen=True)
class WrittenTensor:
    """Hash and finiteness of a tensor that was written.

    Attributes:
        sha256: hex hash of its bytes.
        finite: every element is.
    """

    sha256: str
    finite: bool


def hash_tensor(tensor: Tensor) -> str:
    """Return the hex SHA-256 of a tensor's elements."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def write_weights(
    out: Path, shapes: dict[str, torch.Size], buffers: set[str], read: Read, advance: Callable[[int], None]
) -> dict[str, WrittenTensor]:
    """Write parameters to `out`/model and buffers to `out`/buffers.pt; return what was written, by name.

    Args:
        out: the checkpoint's folder.
        shapes: of every parameter and persistent buffer.
        buffers: names of those that are buffers.
        read: returns one of them, float32; called once for each.
        advance: called with the bytes of each.
    """
    import torch.distributed.checkpoint as dcp

    written: dict[str, WrittenTensor] = {}

    def resolve(name: str) -> Tensor:
        tensor = read(name)
        check_locks()
        written[name] = WrittenTensor(hash_tensor(tensor), bool(torch.isfinite(tensor).all()))
        advance(tensor.nbytes)
        return tensor

    class LazyPlanner(dcp.DefaultSavePlanner):
        """Plans with tensors of the meta device and reads each one when it is its turn to be written."""

        def resolve_data(self, write_item: Any) -> Any:
            """Return the tensor of an item of the plan."""
            return resolve(write_item.index.fqn.removeprefix("model."))

    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name not in buffers}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            dcp.save({"model": state}, checkpoint_id=out / "model", planner=LazyPlanner(), no_dist=True)
        except CheckpointException as error:  # a BaseException that wraps what `read` or the disk raised
            raise next((inner for inner, _ in error.failures.values()), error) from None
    if buffers:
        save_with_torch({name: resolve(name) for name in sorted(buffers)}, out / BUFFERS)
    return written


def check_read_back(out: Path, written: dict[str, WrittenTensor], read: Read, advance: Callable[[int], None]) -> None:
    """Read every tensor back and compare its hash; CheckpointError at the first that differs.

    Args:
        out: where they were written, for the message.
        written: by name.
        read: returns one of them from the disk, as it is stored.
        advance: called with the bytes of each.
    """
    for name, expected in written.items():
        tensor = read(name)
        if hash_tensor(tensor) != expected.sha256:
            raise CheckpointError(
                f"{name} was read back from {out} with other content than was written. Check the disk."
            )
        advance(tensor.nbytes)


def write_documents(
    out: Path,
    config: RunConfig,
    origin: dict[str, Any],
    written: dict[str, WrittenTensor],
    begins_with_bos: bool | None,
) -> None:
    """Write config, trainer state and, last, the manifest with the hashes of all files.

    Args:
        out: the checkpoint's folder.
        config: of the checkpoint.
        origin: what the weights were made of.
        written: every weight.
        begins_with_bos: True if documents began with BOS in training; None if that is not known.
    """
    write_text(out / "config.yaml", dump_config(config))
    state: dict[str, Any] = {"step": 0, "tokens": 0, "skipped_steps": 0}
    if begins_with_bos is not None:
        state[BEGINS_WITH_BOS] = begins_with_bos  # not under "data", the position in it, by which a run resumes
    write_text(out / TRAINER_STATE, json.dumps(state, indent=1) + "\n")
    facts = {
        **{"step": 0, "tokens": 0, "sequence": 0, "parent": None, "run_id": None},
        **{"engine": "native", "world_size": 1, "versions": software_versions("native")},
        HEALTH: make_health(0, all(tensor.finite for tensor in written.values())),
        "converted_from": origin,
    }
    write_manifest(out, facts)
