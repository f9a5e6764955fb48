"""Engines whose collectives are counted: those of this project, and wrappings that do not know of the loop."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, make_engine
from megatron_rdt.parallel.fsdp import FullyShardedEngine

# Label -> options of `parallel`.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "fsdp kept-gathered": {"engine": "fsdp", "reshard_after_forward": False},
    "fsdp replicate 2": {"engine": "fsdp", "replicate": 2},
    "fsdp reduce per_micro_batch": {"engine": "fsdp", "reduce": "per_micro_batch"},
    "zero1": {"engine": "zero1"},
    "zero2": {"engine": "zero2"},
    "zero3": {"engine": "zero3"},
}
# These send something in every iteration, by design.
GROWING: dict[str, dict[str, Any]] = {
    "fsdp core_gather per_layer": {"engine": "fsdp", "core_gather": "per_layer"},
    "fsdp tensor 2": {"engine": "fsdp", "tensor": 2},
    "fsdp context 2": {"engine": "fsdp", "context": 2},
    "fsdp expert 2": {"engine": "fsdp", "expert": 2},
}
# These gather the core again in every iteration, because nobody told them of the loop.
COMPARISONS: dict[str, dict[str, Any]] = {
    "fsdp layer-units": {"engine": "fsdp"},
    "zero3 no-leaf-modules": {"engine": "zero3", "deepspeed": {"zero_optimization": {"max_live_parameters": 0}}},
}


class LayerUnitsEngine(FullyShardedEngine):
    """FSDP2 as one would wrap the model without knowing of the loop: every layer is a unit, the core is none."""

    def _apply_fsdp(self, model: RecurrentDepthTransformer) -> None:
        """Shard every layer by itself, then the rest of the model; the core as a whole is not wrapped."""
        for unit in (*model.prelude, *model.core.layers, *model.coda, model):
            fully_shard(unit, mesh=self.meshes.state)


@contextlib.contextmanager
def without_leaf_modules() -> Iterator[None]:
    """Keep ZeRO-3 from learning which module owns the loop, as long as the context is open."""
    from megatron_rdt.parallel.zero import import_deepspeed

    utilities = import_deepspeed().utils
    mark, utilities.set_z3_leaf_modules = utilities.set_z3_leaf_modules, lambda *_: None
    yield
    utilities.set_z3_leaf_modules = mark


def build_case(label: str, model_config: ModelConfig, global_batch: int, micro_batch: int) -> Engine:
    """The engine of a label of ENGINES, GROWING or COMPARISONS, or "single", set up on the CPU."""
    parallel = {"single": {"engine": "single"}, **ENGINES, **GROWING, **COMPARISONS}[label]
    if parallel.get("expert", 1) > 1:
        model_config = replace(model_config, core_ffn="moe")
    train = TrainConfig(global_batch=global_batch, micro_batch=micro_batch, device="cpu")
    config = RunConfig(model=model_config, train=train, parallel=ParallelConfig(**parallel))
    cpu = torch.device("cpu")
    engine = LayerUnitsEngine(config, cpu) if label == "fsdp layer-units" else make_engine(config, cpu)
    if label == "single":  # the reference computes the whole batch alone, also inside a process group
        engine.rank, engine.world_size = 0, 1
    with torch.device("meta"):
        model = RecurrentDepthTransformer(model_config)
    with without_leaf_modules() if label == "zero3 no-leaf-modules" else contextlib.nullcontext():
        engine.setup(model)
    return engine
