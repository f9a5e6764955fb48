"""Started by torchrun: builds every engine and writes hashes of its initial weights, gathered."""

import argparse
import hashlib
import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.environment import leave_process
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, make_engine
from megatron_rdt.parallel.native import full_tensor


def config_for(name: str, tied: bool, world_size: int = 1) -> RunConfig:
    # 61 rows and 3 ranks: shards of different sizes.
    return RunConfig(
        model=ModelConfig(vocab_size=61, dim=32, core_layers=1, heads=4, kv_heads=2, tie_embeddings=tied),
        train=TrainConfig(global_batch=world_size, micro_batch=1, device="cpu"),
        parallel=ParallelConfig(engine=name),  # type: ignore[arg-type]
    )


def hashes(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> dtype, shape and SHA-256 of the bytes."""
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()}"
        for name, tensor in weights.items()
    }


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter of the engine's model, whole, on every rank."""
    parameters = dict(engine.model.named_parameters())
    if engine.config.parallel.engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {name: full_tensor(parameter).detach().clone() for name, parameter in parameters.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("engines", nargs="+")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    verdict: dict[str, object] = {"world_size": dist.get_world_size()}
    for name in options.engines:
        for tied in (True, False):
            config = config_for(name, tied, dist.get_world_size())
            engine = make_engine(config, torch.device("cpu"))
            with torch.device("meta"):
                model = RecurrentDepthTransformer(config.model)
            engine.setup(model)
            found: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(found, hashes(whole_weights(engine)))
            verdict[f"{name} {'tied' if tied else 'untied'}"] = found
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(verdict))
    dist.barrier()


if __name__ == "__main__":
    main()
    leave_process(0)
