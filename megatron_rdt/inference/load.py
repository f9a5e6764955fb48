"""Loading a model and its tokenizer for inference, from a checkpoint or an export."""

from pathlib import Path

import torch

from megatron_rdt.checkpoint import (
    check_weights_fit,
    read_begins_with_bos,
    read_from_checkpoint,
    read_model_weights,
    read_trainer_state,
)
from megatron_rdt.config import ModelConfig, load_saved_config
from megatron_rdt.convert.hf import check_tokenizer, has_declared_bos, is_hf_export, read_hf
from megatron_rdt.convert.hf_tokenizer import open_exported_tokenizer
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import RecurrentDepthTransformer, reset_buffers
from megatron_rdt.run_directory import WeightKind


def load(
    checkpoint: str | Path, device: str | torch.device = "auto", weights: WeightKind = "model"
) -> tuple[RecurrentDepthTransformer, Tokenizer]:
    """Load model and tokenizer from a checkpoint, a run (its newest healthy one) or an export, in evaluation mode.

    Args:
        checkpoint: a checkpoint directory, a run directory, or a folder that `rdt convert --to hf` wrote.
        device: "auto" takes a GPU if there is one.
        weights: "ema" for the average of the weights, of a run with `optimizer.ema`.

    Raises:
        ConfigError: the device cannot be used here, or an export is asked for an average.
        CheckpointError: there is no model, or it is damaged.
    """
    target, directory = choose_device(device), Path(checkpoint)
    if is_hf_export(directory):
        if weights != "model":
            raise ConfigError(f"{directory} is an export, with one set of weights. Omit --weights {weights}.")
        config, own = read_hf(directory)
        tokenizer = open_exported_tokenizer(directory)
        check_tokenizer(directory, tokenizer)
        tokenizer.begins_with_bos = has_declared_bos(directory)
        return build_model(config, own, directory).to(target), tokenizer
    return read_from_checkpoint(directory, lambda found: load_verified(found, target, weights))


def load_verified(
    directory: Path, device: str | torch.device = "auto", weights: WeightKind = "model"
) -> tuple[RecurrentDepthTransformer, Tokenizer]:
    """Load model and tokenizer from a checkpoint directory that `resolve_checkpoint` has verified.

    `begins_with_bos` of the tokenizer is that of the training, where the checkpoint says it; `weights` as in `load`.
    """
    target, tokenizer = choose_device(device), Tokenizer(directory / "tokenizer")
    recorded = read_begins_with_bos(read_trainer_state(directory))
    if recorded is not None:
        tokenizer.begins_with_bos = recorded
    model = build_model(load_saved_config(directory).model, read_model_weights(directory, weights), directory)
    return model.to(target), tokenizer


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], source: Path) -> RecurrentDepthTransformer:
    """Build the model of `config` with these weights, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: names or shapes of the weights do not fit the config; the message names `source`.
    """
    check_weights_fit(source, config, {name: tensor.shape for name, tensor in weights.items()})
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    reset_buffers(model)  # buffers outside the state dict are still on the meta device
    model.load_state_dict(weights, assign=True)
    return model.eval()


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`, after allocating on it; "auto" is a GPU if there is one, else the CPU.

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
    except Exception:  # every missing backend raises an error of its own
        usable = False
    if not usable:
        count = torch.cuda.device_count()
        raise ConfigError(
            f"the device {device} cannot be used here; PyTorch sees {count} CUDA device{'s' * (count != 1)}. "
            "Set --device cpu, or auto."
        )
    return device
