"""Compare each rank's initial shards with the same parts of one process's weights, and load checkpoints over none."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.parallel import build_engine
from tests.distributed.initial_weights_worker import make_config, take_tiny_step
from tests.distributed.world_size_worker import gather_weights

DENSE = ModelConfig(vocab_size=60, dim=32, core_layers=1, heads=4, kv_heads=4, injection="linear")
EXPERTS = ModelConfig(vocab_size=60, dim=32, core_layers=1, heads=4, kv_heads=4, core_ffn="moe", experts=4)


def compare_shards(cases: list[tuple[ModelConfig, dict[str, Any]]]) -> list[list[str]]:
    """Return, per case, this rank's placements of all parameters, or what is wrong with the first wrong one."""
    warnings.simplefilter("ignore")
    found = []
    for model, axes in cases:
        split = axes.get("tensor", 1) * axes.get("context", 1)
        config = RunConfig(
            model=model,
            train=TrainConfig(global_batch=dist.get_world_size() // split, micro_batch=1, device="cpu"),
            parallel=ParallelConfig(engine="fsdp", **axes),
        )
        whole = dict(initialize(RecurrentDepthTransformer(model), config.run.seed).named_parameters())
        found.append(_compare(dict(build_engine(config, torch.device("cpu")).model.named_parameters()), whole))
    return found


def _compare(parameters: dict[str, Any], whole: dict[str, torch.nn.Parameter]) -> list[str]:
    """Return the placements of all parameters, or a sentence about the first whose shard is not that of `whole`."""
    seen: set[str] = set()
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        like = distribute_tensor(whole[name].data, parameter.device_mesh, parameter.placements, src_data_rank=None)
        if not torch.equal(parameter.to_local(), like.to_local()) or not torch.equal(
            parameter.full_tensor(), whole[name]
        ):
            return [f"{name} {parameter.placements} differs"]
        seen.update(map(repr, parameter.placements))
    return sorted(seen)


def load_over_nan(engines: list[str], root: Path) -> dict[str, bool]:
    """Return, per engine, True if it has the weights of the one that was saved after its own began as NaN and were loaded."""

    def fill_with_nan(name: str, shape: torch.Size, blocks: Any) -> None:
        for values, _ in blocks:
            values.fill_(torch.nan)

    warnings.simplefilter("ignore")
    found = {}
    for name in engines:
        config, folder = make_config(name, seed=7), root / name.replace(" ", "-")
        saved = build_engine(config, torch.device("cpu"))
        take_tiny_step(saved)  # DeepSpeed's optimizer has state to save from the first step on
        saved.save(folder)
        dist.barrier()
        loaded = build_engine(config, torch.device("cpu"), fill_with_nan)
        loaded.load(folder)
        expected = gather_weights(saved)
        before = all(torch.equal(value, expected[key]) for key, value in gather_weights(loaded).items())
        take_tiny_step(loaded)  # copies masters to the model
        found[name] = before and all(bool(value.isfinite().all()) for value in gather_weights(loaded).values())
    return found
