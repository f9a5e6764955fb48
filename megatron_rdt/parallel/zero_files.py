"""DeepSpeed's own checkpoint files, read without running what they say.

DeepSpeed reads them as pickles without restriction. Here every one of its reads is forced through PyTorch's restricted
unpickler, with the few classes of DeepSpeed that its files hold; and names in them, of which its converter makes paths,
are checked before.
"""

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.environment import force_weights_only
from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.untrusted_files import is_plain_name, load_with_torch

ZERO_FOLDER, TAG = "zero", "state"


@contextlib.contextmanager
def restrict_deepspeed() -> Iterator[None]:
    """Let every `torch.load` in the block, DeepSpeed's included, make tensors, plain values and DeepSpeed's own records.

    Its records are plain ones, whose constructors only keep what they are given.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with force_weights_only(), torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        yield


def read_zero_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a ZeRO save by parameter name, float32.

    Raises:
        CheckpointError: it is damaged, or holds objects that could run code.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = checkpoint / ZERO_FOLDER
    check_zero_files(checkpoint)
    with _run_deepspeed_tool(folder), restrict_deepspeed():
        # The tag is given: DeepSpeed would follow whatever path the file `latest` says.
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}


def convert_to_universal(checkpoint: Path, out: Path) -> None:
    """Write the universal layout of a ZeRO save into `out`.

    Raises:
        CheckpointError: it is damaged, or holds objects that could run code.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder = checkpoint / ZERO_FOLDER / TAG
    check_zero_files(checkpoint)
    # The options of its command line; with one worker it stays in this process, where its reads are restricted.
    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with _run_deepspeed_tool(folder), restrict_deepspeed():
        ds_to_universal.main(options)


@contextlib.contextmanager
def _run_deepspeed_tool(folder: Path) -> Iterator[None]:
    """Drop what a tool of DeepSpeed prints to both streams; turn what it raises into a CheckpointError about `folder`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except OSError:  # a full disk, for example
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"DeepSpeed could not read {folder}: {reason}. {USE_ANOTHER}") from error


def check_zero_files(checkpoint: Path) -> None:
    """Read a ZeRO save's files, except the content of tensors, and raise CheckpointError for what could do harm.

    That is: objects of classes that do not belong there, and names of which DeepSpeed would make paths elsewhere.
    """
    files = sorted((checkpoint / ZERO_FOLDER / TAG).glob("*.pt"))
    if not files:
        raise CheckpointError(f"{checkpoint / ZERO_FOLDER / TAG} holds no files of a ZeRO engine. {USE_ANOTHER}")
    with restrict_deepspeed():
        for file in files:
            try:
                content = load_with_torch(file, lazily=True)
            except ValueError as error:
                raise CheckpointError(f"{file} cannot be used: {error}. Nothing was run. {USE_ANOTHER}") from None
            if (name := _find_path_like_key(content)) is not None:
                raise CheckpointError(f"{file} names a parameter {name!r}, which would be a path. {USE_ANOTHER}")


def _find_path_like_key(content: Any) -> str | None:
    """Return a key anywhere in dicts and lists that leads elsewhere where it is taken for a file's name; None if none."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(key, str) and key and not is_plain_name(key):
                    return key
                left.append(inner)
        elif isinstance(value, list | tuple):
            left.extend(value)
    return None
