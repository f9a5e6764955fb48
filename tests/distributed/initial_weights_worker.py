"""Begin runs of every engine with the weights of checkpoints of every format; runs on every rank."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.buffers import persistent_buffers
from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, dump_config
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import CheckpointError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, MicroBatch, build_engine, make_engine
from megatron_rdt.train import initial_weights
from megatron_rdt.train.initial_weights import InitialWeights
from tests.distributed.world_size_worker import gather_weights

TINY_RATE = 1e-30  # a step that moves the master weights by nothing, and copies them to the model


def make_config(engine: str, seed: int) -> RunConfig:
    """A tiny run on this engine; "fsdp tensor" splits heads and channels too. Experts have a buffer."""
    model = ModelConfig(vocab_size=62, dim=32, core_layers=1, heads=4, kv_heads=2, core_ffn="moe", experts=4)
    name, _, axis = engine.partition(" ")
    parallel = ParallelConfig(engine=name, tensor=2 if axis else 1)  # type: ignore[arg-type]
    train = TrainConfig(global_batch=dist.get_world_size(), micro_batch=1, device="cpu", sequence_length=8)
    config = RunConfig(model=model, train=train, parallel=parallel)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))


def save_run(engine_name: str, tokenizer: Path, root: Path) -> Path:
    """Save a checkpoint of an engine with random weights and a selection bias; return its directory."""
    config = make_config(engine_name, seed=7)
    engine = build_engine(config, torch.device("cpu"))
    for buffer in persistent_buffers(engine.model).values():
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) / 8)
    facts = {"run_id": engine_name, "parent": None}
    return checkpoints.stage_checkpoint(
        engine, root / engine_name, dump_config(config), {"step": 5}, facts, tokenizer, keep=0
    )()


def take_weights(source: Path, engine_name: str, tokenizer: Path) -> tuple[Engine, InitialWeights]:
    """Set up an engine of another seed with the weights of `source`."""
    config = make_config(engine_name, seed=1)
    engine = make_engine(config, torch.device("cpu"))
    weights = InitialWeights(source, config, engine, tokenizer)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    engine.setup(model, weights.fill)
    weights.fill_buffers()
    return engine, weights


def take_tiny_step(engine: Engine) -> None:
    """Train on one random sequence per rank, at a learning rate of next to nothing."""
    tokens = torch.randint(0, 62, (1, 9), generator=torch.Generator().manual_seed(3))
    engine.forward_backward([MicroBatch(Batch(tokens), DepthPlan((2,), 2))])
    engine.clip(1.0)
    engine.step(TINY_RATE)


def compare_all(
    sources: Sequence[str], targets: Sequence[str], tokenizer: Path, root: Path
) -> dict[str, dict[str, float]]:
    """Largest difference from the checkpoint, over all tensors, by "source -> target": at first, and after a step."""
    warnings.simplefilter("ignore")
    initial_weights.PIECE = 100  # several pieces of a tensor, and rows that are longer than one
    found = {}
    for source_name in sources:
        source = save_run(source_name, tokenizer, root)
        expected = checkpoints.read_model_weights(source)
        for target in targets:
            engine, _ = take_weights(source, target, tokenizer)
            row = {}
            for moment in ("begun", "stepped"):
                weights = {**gather_weights(engine), **persistent_buffers(engine.model)}
                assert weights.keys() == expected.keys()
                row[moment] = max(float((weights[n].detach() - expected[n]).abs().max()) for n in expected)
                if moment == "begun":
                    take_tiny_step(engine)
            found[f"{source_name} -> {target}"] = row
    return found


def fail_on_rank_0(tokenizer: Path, root: Path) -> list[str]:
    """The error of this rank where rank 0 finds another model, and where it cannot read a tensor."""
    source, errors = save_run("fsdp", tokenizer, root), []
    config = make_config("fsdp", seed=1)
    engine = make_engine(config, torch.device("cpu"))
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=64))
    try:
        InitialWeights(source, wider, engine, tokenizer)
    except CheckpointError as error:
        errors.append(str(error))
    weights = InitialWeights(source, config, engine, tokenizer)
    try:
        weights.fill("no such tensor", torch.Size([1]), [])
    except CheckpointError as error:
        errors.append(str(error))
    return errors
