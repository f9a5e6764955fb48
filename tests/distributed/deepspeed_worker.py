"""Compare ZeRO, with offload and with keys of `parallel.deepspeed`, with one process; runs on two ranks."""

import math
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch

from megatron_rdt.config import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.parallel import Engine
from megatron_rdt.parallel.collective_counter import CollectiveCounter
from megatron_rdt.parallel.zero import ZeroEngine
from tests.distributed.engine_worker import MIXED, MODEL, SEQUENCES, make_micro_batches
from tests.distributed.reference import build_on_cpu, relative_difference

LR, CLIP, SIZE = 0.01, 0.5, 2
STEPS = (3, MIXED, 5, 2)  # T of each step
SAVED_AT = 2
BUCKET = 700  # elements reduced at a time: far fewer than the model has
AHEAD = {"stage3_prefetch_bucket_size": 3000, "stage3_max_live_parameters": 30_000}  # of the 43,000 of the model
# Name, engine, parallel.offload, parallel.deepspeed; the first has neither, to compare collectives with.
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("plain", "zero2", "none", {}),
    ("keys", "zero2", "none", {"zero_optimization": {"reduce_bucket_size": BUCKET, "overlap_comm": True}}),
    ("zero1", "zero1", "optimizer", {"zero_optimization": {"overlap_comm": False}}),
    ("zero2", "zero2", "optimizer", {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}),
    ("zero3", "zero3", "optimizer", {"zero_optimization": {"stage3_param_persistence_threshold": 40}}),
    ("zero3 parameters", "zero3", "parameters", {"zero_optimization": {"sub_group_size": 5000, **AHEAD}}),
]


def build(name: str, offload: str = "none", keys: dict[str, Any] | None = None) -> Engine:
    """An engine with `parallel.offload` and the keys of `parallel.deepspeed`."""
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(global_batch=SEQUENCES, micro_batch=SIZE),
        optimizer=OptimizerConfig(lr=LR, grad_clip=CLIP),
        parallel=ParallelConfig(engine=name, offload=offload, deepspeed=keys),
    )
    return build_on_cpu(config)


def gather_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Gather the weights, by name."""
    named = dict(engine.model.named_parameters())
    sharded = [parameter for parameter in named.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return True if all tensors are equal, bit for bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


def take_poisoned_step(engine: Engine, tokens: torch.Tensor) -> dict[str, Any]:
    """Throw a step away, as the trainer does, whose gradient is not a number on one rank; check that weights stay."""
    before, backward = gather_weights(engine), engine.backward
    factor = math.nan if engine.rank else 1.0
    engine.backward = lambda loss, last: backward(loss * factor, last)  # type: ignore[method-assign]
    engine.forward_backward(make_micro_batches(tokens, engine, SIZE, 2, None))
    engine.backward = backward  # type: ignore[method-assign]
    norm = float(engine.clip(CLIP))
    engine.discard_gradients()
    return {"norm is finite": math.isfinite(norm), "weights kept": are_equal(before, gather_weights(engine))}


@torch.no_grad()
def evaluate(engine: Engine, tokens: torch.Tensor) -> float:
    """Mean loss of the whole batch, by a forward pass that no backward pass follows."""
    [micro] = make_micro_batches(tokens, engine, len(tokens), 4, None)
    inputs, named = micro.batch.inputs()
    objective = engine.module(inputs, micro.plan, **named)["objective"]
    return float(engine.sum_over_ranks(objective.double()))


def train(engine: Engine, single: Engine, tokens: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Take steps on both engines and return their largest relative differences; `engine` also throws one step away."""
    found: dict[str, Any] = {"gradient": 0.0, "norm": 0.0, "evaluated": 0.0}
    for step, loops in enumerate(STEPS):
        if step == SAVED_AT:
            engine.save(folder)
            found |= take_poisoned_step(engine, tokens.flip(1))
        engine.forward_backward(make_micro_batches(tokens, engine, SIZE, loops, None))
        single.forward_backward(make_micro_batches(tokens, single, len(tokens), loops, None))
        gradients, reference = engine.full_gradients(), single.full_gradients()
        worst = max(relative_difference(gradients[name], reference[name]) for name in reference)
        norm, expected = float(engine.clip(CLIP)), float(single.clip(CLIP))
        found["gradient"] = max(found["gradient"], worst)
        found["norm"] = max(found["norm"], abs(norm - expected) / expected)
        engine.step(LR)
        single.step(LR)
        expected = evaluate(single, tokens)
        found["evaluated"] = max(found["evaluated"], abs(evaluate(engine, tokens) - expected) / expected)
    mine, theirs = gather_weights(engine), gather_weights(single)
    start = gather_weights(build("single"))
    # Relative to the distance that training moved them.
    found["weights"] = max(
        float((mine[name] - theirs[name]).norm() / (theirs[name] - start[name]).norm()) for name in theirs
    )
    return found


def resume(engine: Engine, tokens: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Load what `train` saved, take the steps that follow, and return the weights."""
    engine.load(folder)
    for loops in STEPS[SAVED_AT:]:
        engine.forward_backward(make_micro_batches(tokens, engine, SIZE, loops, None))
        engine.clip(CLIP)
        engine.step(LR)
    return gather_weights(engine)


def count_collectives(engine: Engine, tokens: torch.Tensor) -> int:
    """Collectives of one forward and backward pass."""
    with CollectiveCounter() as counter:
        engine.forward_backward(make_micro_batches(tokens, engine, SIZE, 2, None))
    engine.discard_gradients()
    return len(counter.calls)


def check_cases(root: Path) -> dict[str, Any]:
    """Train and resume every case, with checkpoints below `root`, and return the findings by name."""
    tokens = torch.randint(0, 61, (SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    verdict: dict[str, Any] = {}
    for name, stage, offload, keys in CASES:
        engine, folder = cast(ZeroEngine, build(stage, offload, keys)), root / name
        found = train(engine, build("single"), tokens, folder)
        after = gather_weights(engine)
        found["resumed exactly"] = are_equal(after, resume(build(stage, offload, keys), tokens, folder))
        found["rolled back exactly"] = are_equal(after, resume(engine, tokens, folder))
        if offload != "none":
            others = {key: value for key, value in keys["zero_optimization"].items() if key != "offload_optimizer"}
            back = resume(build(stage, "none", {"zero_optimization": others}), tokens, folder)
            found["resumed without offload"] = max(relative_difference(back[key], after[key]) for key in after)
        if name == "plain":
            other = resume(build(stage, "optimizer", {}), tokens, folder)
            found["resumed with offload"] = max(relative_difference(other[key], after[key]) for key in after)
        found["collectives"] = count_collectives(engine, tokens)
        inner = engine.module.optimizer
        found["bucket"] = getattr(inner, "reduce_bucket_size", None)
        found["optimizer"] = type(inner.optimizer).__module__
        verdict[name] = found
    return verdict
