"""A model ready for use, from a checkpoint or an export."""

from pathlib import Path

import torch

from megatron_rdt.checkpoint import read_model_weights, resolve_checkpoint
from megatron_rdt.config import ModelConfig, load_config
from megatron_rdt.convert.hf import check_tokenizer, is_hf_export, read_hf
from megatron_rdt.convert.hf_tokenizer import exported_tokenizer
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.model import RecurrentDepthTransformer, reset_buffers


def load(checkpoint: str | Path, device: str | torch.device = "auto") -> tuple[RecurrentDepthTransformer, Tokenizer]:
    """Model and tokenizer of a checkpoint (or of the newest one of a run) or of an export, in evaluation mode.

    Args:
        checkpoint: a checkpoint directory, a run directory, or a folder that `rdt convert --to hf` wrote.
        device: "auto" takes a GPU where there is one.

    Raises:
        ConfigError: the device cannot be used here.
        CheckpointError: there is no model, or it is damaged.
    """
    place, directory = choose_device(device), Path(checkpoint)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file. Name a run directory, a checkpoint or an export.")
    if is_hf_export(directory):
        config, weights = read_hf(directory)
        tokenizer = exported_tokenizer(directory)
        check_tokenizer(directory, tokenizer)
        return build(config, weights, directory).to(place), tokenizer
    return load_verified(resolve_checkpoint(directory), place)


def load_verified(directory: Path, device: str | torch.device = "auto") -> tuple[RecurrentDepthTransformer, Tokenizer]:
    """`load` of a checkpoint directory that `resolve_checkpoint` returned."""
    place = choose_device(device)
    model = build(load_config(directory / "config.yaml").model, read_model_weights(directory), directory)
    return model.to(place), Tokenizer(directory / "tokenizer")


def build(config: ModelConfig, weights: dict[str, torch.Tensor], source: Path) -> RecurrentDepthTransformer:
    """The model with these weights, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: names or shapes of the weights, read from `source`, are not those of the config.
    """
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [n for n in {*shapes, *weights} if n not in shapes or n not in weights or weights[n].shape != shapes[n]]
    if wrong:
        raise CheckpointError(f"{source} does not fit its own config: {sorted(wrong)[:3]}. Use another checkpoint.")
    reset_buffers(model)  # those that are no part of the state would stay without memory
    model.load_state_dict(weights, assign=True)
    return model.eval()


def choose_device(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device, or PyTorch cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        usable = device.type != "meta"
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"there is no device {str(name)!r}. Set --device cpu, cuda, cuda:N or auto.") from None
    try:
        torch.zeros(1, device=device)
    except Exception:  # each backend that is missing has an error of its own
        usable = False
    if not usable:
        count = torch.cuda.device_count()
        raise ConfigError(
            f"the device {device} cannot be used here; PyTorch sees {count} CUDA device{'s' * (count != 1)}. "
            "Set --device cpu, or auto."
        )
    return device
