"""Build every engine and hash its initial weights, gathered; runs on every rank."""

import hashlib
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.parallel import Engine, build_engine
from megatron_rdt.parallel.torch_engine import full_tensor


def make_config(name: str, tied: bool, world_size: int = 1) -> RunConfig:
    # 61 rows and 3 ranks: shards of different sizes.
    return RunConfig(
        model=ModelConfig(vocab_size=61, dim=32, core_layers=1, heads=4, kv_heads=2, tie_embeddings=tied),
        train=TrainConfig(global_batch=world_size, micro_batch=1, device="cpu"),
        parallel=ParallelConfig(engine=name),  # type: ignore[arg-type]
    )


def hash_tensors(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> dtype, shape and SHA-256 of the bytes."""
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()}"
        for name, tensor in weights.items()
    }


def gather_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Gather every parameter of the engine's model, on every rank."""
    parameters = dict(engine.model.named_parameters())
    if engine.config.parallel.engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {name: full_tensor(parameter).detach().clone() for name, parameter in parameters.items()}


def hash_initial_weights(engines: Sequence[str]) -> dict[str, dict[str, str]]:
    """Hashes of the initial weights of every engine, gathered on this rank, with tied embeddings and without."""
    warnings.simplefilter("ignore")
    found = {}
    for name in engines:
        for tied in (True, False):
            config = make_config(name, tied, dist.get_world_size())
            engine = build_engine(config, torch.device("cpu"))
            found[f"{name} {'tied' if tied else 'untied'}"] = hash_tensors(gather_weights(engine))
    return found
