"""Collectives and memory of real steps, with those that the planner computes; started by torchrun."""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.environment import leave_process
from megatron_rdt.parallel import build_engine
from megatron_rdt.planner.communication import step_communication, sum_by_kind
from megatron_rdt.planner.measure import measure_steps, take_step
from megatron_rdt.planner.memory import StepDepth, step_memory

LOOPS, K = (1, 8), 2
MODEL: dict[str, Any] = {
    **{"vocab_size": 131, "dim": 36, "prelude_layers": 2, "core_layers": 2, "coda_layers": 1},
    **{"heads": 6, "kv_heads": 2, "ffn_dim": 50},
}
EVEN: dict[str, Any] = MODEL | {"vocab_size": 132}
LATENT: dict[str, Any] = EVEN | {"attention": "mla", "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
EXPERTS: dict[str, Any] = MODEL | {"core_ffn": "moe", "experts": 4}
SHARED: dict[str, Any] = MODEL | {"norm_placement": "sandwich", "core_norm": "last_shared", "tie_embeddings": False}
AHEAD = {"max_live_parameters": 60_000, "prefetch_bucket_size": 3000}  # of the 49,000 numbers of MODEL
# Name, model, options of `parallel`, checkpointing; in bfloat16 if the name says so.
COLLECTIVE_CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("ddp", MODEL | {"vocab_size": 20000}, {"engine": "ddp"}, "none"),
    ("ddp, per micro-batch", MODEL, {"engine": "ddp", "reduce": "per_micro_batch"}, "none"),
    ("fsdp", MODEL, {}, "none"),
    ("fsdp, per micro-batch", EXPERTS, {"reduce": "per_micro_batch"}, "per_iteration"),
    ("fsdp, kept", SHARED, {"reshard_after_forward": False}, "none"),
    ("fsdp, per_layer", MODEL, {"core_gather": "per_layer"}, "none"),
    ("fsdp, per_layer, kept", MODEL, {"core_gather": "per_layer", "reshard_after_forward": False}, "none"),
    ("fsdp, per_iteration", MODEL, {"core_gather": "per_iteration"}, "per_iteration"),
    ("fsdp, per_layer, bfloat16", EXPERTS, {"core_gather": "per_layer"}, "per_iteration"),
    (
        "fsdp, per_iteration, bfloat16, kept",
        MODEL,
        {"core_gather": "per_iteration", "reshard_after_forward": False},
        "none",
    ),
    ("replicate", MODEL, {"replicate": 2}, "none"),
    ("tensor", EVEN, {"tensor": 2}, "none"),
    ("tensor, latent, checkpoints", LATENT, {"tensor": 2}, "per_iteration"),
    ("tensor, per_layer, bfloat16", LATENT, {"tensor": 2, "core_gather": "per_layer"}, "none"),
    ("context", MODEL, {"context": 2}, "per_iteration"),
    ("context, latent", LATENT, {"context": 2}, "none"),
    ("ring", MODEL, {"core_ring": 2}, "none"),
    ("ring, lanes, checkpoints", SHARED | {"injection": "hyper", "lanes": 3}, {"core_ring": 2}, "per_iteration"),
    ("zero1", SHARED, {"engine": "zero1"}, "none"),
    ("zero2", MODEL, {"engine": "zero2"}, "none"),
    ("zero3", SHARED, {"engine": "zero3"}, "none"),
    ("zero3, small bucket", MODEL, {"engine": "zero3", "deepspeed": {"zero_optimization": AHEAD}}, "per_iteration"),
]
# Model, precision, checkpointing, micro-batches; the last ones have a core too large for its device.
MEMORY_CASES: list[tuple[dict[str, Any], str, str, int, dict[str, Any]]] = [
    ({"dim": 128, "ffn_dim": 256, "vocab_size": 1024}, "float32", "none", 1, {}),
    ({"dim": 256, "ffn_dim": 1024, "vocab_size": 1024}, "bfloat16", "per_iteration", 2, {}),
    ({"dim": 256, "core_ffn": "moe", "vocab_size": 1024}, "float32", "per_iteration", 2, {"core_gather": "per_layer"}),
    ({"dim": 256, "ffn_dim": 1024, "vocab_size": 1024}, "bfloat16", "none", 2, {"core_gather": "per_layer"}),
    ({"dim": 256, "ffn_dim": 1024, "vocab_size": 1024}, "bfloat16", "per_iteration", 2, {"core_ring": 2}),
]


def make_config(model: dict[str, Any], parallel: dict[str, Any], batch: int, **options: Any) -> RunConfig:
    """The config of a case; `batch` is the global batch."""
    return RunConfig(
        model=ModelConfig(**model),
        depth=DepthConfig(backprop=K, checkpoint=options.pop("checkpoint")),
        train=TrainConfig(micro_batch=2, global_batch=batch, device="cpu", **options),
        parallel=ParallelConfig(**{"engine": "fsdp"} | parallel),
    )


def compare_collectives(
    model: dict[str, Any], parallel: dict[str, Any], checkpoint: str, precision: str = "float32"
) -> dict[str, Any]:
    """Return counted and planned collectives at every T, with two micro-batches per process."""
    alone = parallel.get("tensor", 1) * parallel.get("context", 1)
    config = make_config(model, parallel, 8 // alone, checkpoint=checkpoint, sequence_length=16, precision=precision)
    engine = build_engine(config, torch.device("cpu"))
    for _ in range(2):
        take_step(engine, 1)
    found = {}
    for loops in LOOPS:
        depth = StepDepth(loops, min(loops, K))
        planned = sum_by_kind(step_communication(config, engine.layout, depth, gpu=False))
        found[str(loops)] = {"counted": take_step(engine, loops), "planned": planned}
    return found


def compare_memory(
    model: dict[str, Any], precision: str, checkpoint: str, number: int, parallel: dict[str, Any]
) -> list:
    """Return measured and planned peaks of memory at every T."""
    config = make_config(model, parallel, 4 * number, checkpoint=checkpoint, precision=precision, sequence_length=64)
    rows = []
    # Each T three times: on a busy machine the buffers of a collective may be freed late, which only ever adds to a peak.
    steps = measure_steps(config, torch.device("cpu"), [*LOOPS] * 3)
    for measured in (min(steps[first :: len(LOOPS)], key=lambda step: step.peak) for first in range(len(LOOPS))):
        depth = StepDepth(measured.loops, min(measured.loops, K))
        layout = Layout.of(config.parallel, dist.get_world_size())
        rows.append({**asdict(measured), "planned": step_memory(config, layout, False, depth).peak})
    return rows


def main() -> None:
    """Measure as one of the ranks; rank 0 writes the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    verdict = {
        "memory": [compare_memory(*case) for case in MEMORY_CASES],  # before DeepSpeed is imported
        "sent": {
            name: compare_collectives(model, parallel, checkpoint, "bfloat16" if "bfloat16" in name else "float32")
            for name, model, parallel, checkpoint in COLLECTIVE_CASES
        },
    }
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(verdict))
    dist.barrier()


if __name__ == "__main__":
    main()
    leave_process(0)
