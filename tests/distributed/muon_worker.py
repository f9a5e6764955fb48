"""Compare Muon on ranks that hold rows of matrices with one process; runs on every rank."""

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from megatron_rdt.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.parallel import MicroBatch
from megatron_rdt.parallel.torch_engine import TorchEngine, full_tensor
from tests.distributed.reference import build_on_cpu

# 4 experts, 4 heads, 61 rows: on 3 ranks some have fewer rows or experts than others, and some have none.
MODEL = ModelConfig(
    vocab_size=61,
    dim=32,
    core_layers=1,
    heads=4,
    kv_heads=2,
    core_ffn="moe",
    experts=4,
    injection="linear",
    signals=["lora"],
    value_embeddings="gated",
    tie_embeddings=False,
)
SEQUENCES, STEPS, SAVED_AT, LR = 12, 6, 3, 0.01


def build(name: str) -> TorchEngine:
    """An engine that steps with Muon."""
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(global_batch=SEQUENCES, micro_batch=2),
        optimizer=OptimizerConfig(name="muon", lr=LR),
        parallel=ParallelConfig(engine=name),
    )
    return cast(TorchEngine, build_on_cpu(config))


def train(engine: TorchEngine, first: int, last: int, save: Path | None = None) -> list[float]:
    """Take the steps first ... last - 1 and return their losses; save after SAVED_AT steps."""
    losses = []
    for step in range(first, last):
        if step == SAVED_AT and save is not None:
            engine.save(save)
        generator = torch.Generator().manual_seed(step % 2)
        tokens = torch.randint(0, MODEL.vocab_size, (SEQUENCES, 17), generator=generator)
        share = SEQUENCES // engine.world_size
        mine = tokens[engine.rank * share : (engine.rank + 1) * share]
        batch = [MicroBatch(Batch(part), DepthPlan.constant(3, len(part))) for part in mine.split(2)]
        losses.append(float(engine.forward_backward(batch)["cross_entropy"]))
        engine.clip(1.0)
        engine.step(LR, torch.tensor(True))
    return losses


def gather_weights(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Gather the weights, by name."""
    return {name: full_tensor(parameter).detach().clone() for name, parameter in engine.model.named_parameters()}


def largest_difference(a: list[float], b: list[float]) -> float:
    """Largest difference of two losses of the same step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def check_muon(folder: Path) -> dict[str, object]:
    """Train under FSDP2 and DDP and on one process, resume in both engines, and return the differences."""
    single = build("single")
    expected = train(single, 0, STEPS)
    reference = gather_weights(single)
    verdict: dict[str, object] = {"losses": expected, "world_size": dist.get_world_size()}
    for name in ("fsdp", "ddp"):
        saved = folder / name
        engine = build(name)
        losses = train(engine, 0, STEPS, saved)
        verdict[f"{name} loss"] = largest_difference(losses, expected)
        found = gather_weights(engine)
        verdict[f"{name} weights"] = max(float((found[n] - reference[n]).abs().max()) for n in reference)
        momentum = [full_tensor(s["momentum"]) for s in engine.optimizers[1].state.values()]
        verdict[f"{name} matrices"] = len(momentum)
        verdict[f"{name} momentum"] = all(float(m.abs().max()) > 0 for m in momentum)
        resumed = build(name)
        resumed.load(saved)
        verdict[f"{name} resumed"] = train(resumed, SAVED_AT, STEPS) == losses[SAVED_AT:]
        again = gather_weights(resumed)
        verdict[f"{name} resumed weights"] = max(float((again[n] - found[n]).abs().max()) for n in found)
        other = build({"fsdp": "ddp", "ddp": "fsdp"}[name])
        other.load(saved)
        verdict[f"{name} to the other"] = largest_difference(train(other, SAVED_AT, STEPS), expected[SAVED_AT:])
        dist.barrier()
    return verdict
