"""The weights of an export: safetensors, in one file or several with an index, written and read back shard by shard."""

import json
import math
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from megatron_rdt.checkpoint import EXPORT_INDEX, StoredWeights
from megatron_rdt.convert.hf import PREFIX
from megatron_rdt.convert.native_writer import WrittenTensor, check_read_back, hash_tensor
from megatron_rdt.convert.sources.files import open_source_weights
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, ConfigError
from megatron_rdt.files import write_text
from megatron_rdt.locks import check_locks
from megatron_rdt.terminal import show_progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_shard_size(size: str) -> None:
    """Raise ConfigError unless a shard size is a number of bytes with its unit, in transformers' words, and not too small."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
        is_valid = math.isfinite(float(size.strip()[:-2])) and float(size.strip()[:-2]) > 0
    except (ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise ConfigError(f"--shard_size is {size!r}, it must be a number with KB, MB, GB or TB, such as 5GB or 500MB.")


def write_weights(out: Path, source: Path, stored: StoredWeights, dtype: str, shard_size: str) -> None:
    """Write every weight into `out` and read it back; no more than one shard is in memory.

    Args:
        out: folder of the export.
        source: the checkpoint, for messages.
        stored: its weights.
        dtype: one of `DTYPES`, that of the files.
        shard_size: the largest size of a file, such as "5GB"; a weight that is larger has a file of its own.

    Raises:
        CheckpointError: a weight is not finite, or was read back with another content.
    """
    kept = DTYPES[dtype]
    with torch.device("meta"):
        planned = {PREFIX + name: torch.empty(shape, dtype=kept) for name, shape in stored.shapes.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_size)
    written: dict[str, WrittenTensor] = {}
    with show_progress(2 * split.metadata["total_size"], f"convert {source.name}", "B", scaled=True) as advance:
        for file, names in split.filename_to_tensors.items():
            shard = {name: _read_finite(source, stored, name.removeprefix(PREFIX), kept) for name in names}
            written |= {name: WrittenTensor(hash_tensor(tensor), True) for name, tensor in shard.items()}
            check_locks()
            save_file(shard, out / file, {"format": "pt"})
            advance(sum(tensor.nbytes for tensor in shard.values()))
            del shard  # before the next one is read
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_text(out / EXPORT_INDEX, json.dumps(index, indent=2) + "\n")
        check_read_back(out, written, open_source_weights(out).read, advance)


def _read_finite(source: Path, stored: StoredWeights, name: str, dtype: torch.dtype) -> Tensor:
    """Read a weight and round it to `dtype`; CheckpointError if it is not finite before or after."""
    weight = stored.read(name)
    rounded = weight.to(dtype).contiguous()
    for tensor, reason in ((weight, "training has diverged"), (rounded, f"{dtype} cannot hold them; export float32")):
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            first = (~finite).nonzero()[0].tolist()
            raise CheckpointError(
                f"{source}: {name} holds {int((~finite).sum()):,} numbers that are not finite, the first at {first}: {reason}. "
                f"{USE_ANOTHER}"
            )
    return rounded
