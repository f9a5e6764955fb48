"""For two processes: ZeRO with offload and with keys of the user's own, against one process."""

import math
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch

from megatron_rdt.config import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, make_engine
from megatron_rdt.parallel.collective_counter import CollectiveCounter
from megatron_rdt.parallel.zero import ZeroEngine
from tests.distributed.engine_worker import MIXED, MODEL, SEQUENCES, difference, micro_batches

LR, CLIP, SIZE = 0.01, 0.5, 2
STEPS = (3, MIXED, 5, 2)  # T of each step
SAVED_AT = 2
BUCKET = 700  # elements reduced at a time: far fewer than the model has
# Name, engine, parallel.offload, parallel.deepspeed; the first has neither, to compare collectives with.
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("plain", "zero2", "none", {}),
    ("keys", "zero2", "none", {"zero_optimization": {"reduce_bucket_size": BUCKET}}),
    ("zero1", "zero1", "optimizer", {"zero_optimization": {"overlap_comm": True}}),
    ("zero2", "zero2", "optimizer", {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}),
    ("zero3", "zero3", "optimizer", {"zero_optimization": {"stage3_param_persistence_threshold": 40}}),
    ("zero3 parameters", "zero3", "parameters", {"zero_optimization": {"sub_group_size": 5000}}),
]


def engine_for(name: str, offload: str = "none", keys: dict[str, Any] | None = None) -> Engine:
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(global_batch=SEQUENCES, micro_batch=SIZE),
        optimizer=OptimizerConfig(lr=LR, grad_clip=CLIP),
        parallel=ParallelConfig(engine=name, offload=offload, deepspeed=keys),
    )
    engine = make_engine(config, torch.device("cpu"))
    if name == "single":
        engine.rank, engine.world_size = 0, 1
    with torch.device("meta"):
        model = RecurrentDepthTransformer(MODEL)
    engine.setup(model)
    return engine


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights by name."""
    named = dict(engine.model.named_parameters())
    sharded = [parameter for parameter in named.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def poisoned_step(engine: Engine, tokens: torch.Tensor) -> dict[str, Any]:
    """A step whose gradient is not a number on one rank, thrown away as the trainer does."""
    before, backward = weights(engine), engine.backward
    factor = math.nan if engine.rank else 1.0
    engine.backward = lambda loss, last: backward(loss * factor, last)  # type: ignore[method-assign]
    engine.forward_backward(micro_batches(tokens, engine, SIZE, 2, None))
    engine.backward = backward  # type: ignore[method-assign]
    norm = float(engine.clip(CLIP))
    engine.discard_gradients()
    return {"norm is finite": math.isfinite(norm), "weights kept": same(before, weights(engine))}


def train(engine: Engine, single: Engine, tokens: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Some steps on both, one of them thrown away by the first; the largest relative differences."""
    found: dict[str, Any] = {"gradient": 0.0, "norm": 0.0}
    for step, loops in enumerate(STEPS):
        if step == SAVED_AT:
            engine.save(folder)
            found |= poisoned_step(engine, tokens.flip(1))
        engine.forward_backward(micro_batches(tokens, engine, SIZE, loops, None))
        single.forward_backward(micro_batches(tokens, single, len(tokens), loops, None))
        gradients, reference = engine.full_gradients(), single.full_gradients()
        worst = max(difference(gradients[name], reference[name]) for name in reference)
        norm, expected = float(engine.clip(CLIP)), float(single.clip(CLIP))
        found["gradient"] = max(found["gradient"], worst)
        found["norm"] = max(found["norm"], abs(norm - expected) / expected)
        engine.step(LR)
        single.step(LR)
    mine, theirs = weights(engine), weights(single)
    start = weights(engine_for("single"))
    # Relative to how far training moved them.
    found["weights"] = max(
        float((mine[name] - theirs[name]).norm() / (theirs[name] - start[name]).norm()) for name in theirs
    )
    return found


def resume(engine: Engine, tokens: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Weights after the steps that follow the save."""
    engine.load(folder)
    for loops in STEPS[SAVED_AT:]:
        engine.forward_backward(micro_batches(tokens, engine, SIZE, loops, None))
        engine.clip(CLIP)
        engine.step(LR)
    return weights(engine)


def reductions(engine: Engine, tokens: torch.Tensor) -> int:
    """Collectives of one forward and backward pass."""
    with CollectiveCounter() as counter:
        engine.forward_backward(micro_batches(tokens, engine, SIZE, 2, None))
    engine.discard_gradients()
    return len(counter.calls)


def check(root: Path) -> dict[str, Any]:
    """What every case finds, with checkpoints below `root`."""
    tokens = torch.randint(0, 61, (SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    verdict: dict[str, Any] = {}
    for name, stage, offload, keys in CASES:
        engine, folder = cast(ZeroEngine, engine_for(stage, offload, keys)), root / name
        found = train(engine, engine_for("single"), tokens, folder)
        after = weights(engine)
        found["resumed exactly"] = same(after, resume(engine_for(stage, offload, keys), tokens, folder))
        if offload != "none":
            others = {key: value for key, value in keys["zero_optimization"].items() if key != "offload_optimizer"}
            back = resume(engine_for(stage, "none", {"zero_optimization": others}), tokens, folder)
            found["resumed without offload"] = max(difference(back[key], after[key]) for key in after)
        if name == "plain":
            other = resume(engine_for(stage, "optimizer", {}), tokens, folder)
            found["resumed with offload"] = max(difference(other[key], after[key]) for key in after)
        found["collectives"] = reductions(engine, tokens)
        inner = engine.module.optimizer
        found["bucket"] = getattr(inner, "reduce_bucket_size", None)
        found["optimizer"] = type(inner.optimizer).__module__
        verdict[name] = found
    return verdict
