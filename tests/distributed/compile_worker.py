"""Compare compiled layers of several ranks with one process that runs them as written; runs on every rank."""

import functools
from typing import Any

import torch
from torch._dynamo.utils import counters

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.compiling import compile_layers
from megatron_rdt.parallel import Engine, MicroBatch, engine
from tests.distributed.reference import build_on_cpu

MODEL = ModelConfig(vocab_size=62, dim=32, core_layers=2, heads=4, kv_heads=2, ffn_dim=48)
# T of each sequence; in most passes through the core the ranks have different numbers of sequences.
MIXED = (9, 1, 4, 7, 2, 8, 1, 1)
SAME = (5,) * 8
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "fsdp per_layer": {"engine": "fsdp", "core_gather": "per_layer"},
    "tensor": {"engine": "fsdp", "tensor": 2},
    "context": {"engine": "fsdp", "context": 2},
}
CASES = ((None, "none"), (2, "per_iteration"), (3, "per_layer"))
AXES = {"tensor", "context"}  # in one of the cases: what differs is within the layers


def build(parallel: dict[str, Any], compiled: bool) -> Engine:
    """An engine whose layers are compiled or not."""
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(global_batch=8, micro_batch=2, compile="layers" if compiled else "none"),
        parallel=ParallelConfig(**parallel),
    )
    return build_on_cpu(config)


def make_micro_batches(tokens: torch.Tensor, made: Engine, k: int | None, loops: tuple[int, ...]) -> list[MicroBatch]:
    """This rank's micro-batches of two sequences each."""
    rank = made.layout.data_rank(made.rank)
    share = len(tokens) // made.layout.data
    firsts = range(rank * share, (rank + 1) * share, 2)
    return [MicroBatch(Batch(tokens[at : at + 2]), DepthPlan(loops[at : at + 2], k)) for at in firsts]


def check_engines() -> dict[str, Any]:
    """Return the largest relative difference, the graphs and the graph breaks of each engine."""
    engine.compile_layers = functools.partial(compile_layers, backend="aot_eager")  # a C++ compiler would take long
    tokens = torch.randint(0, 62, (8, 17), generator=torch.Generator().manual_seed(1))
    verdict: dict[str, Any] = {}
    for name, parallel in ENGINES.items():
        loops = SAME if "core_gather" in parallel else MIXED
        torch._dynamo.reset()
        counters.clear()
        made, single, worst = build(parallel, True), build({"engine": "single"}, False), 0.0
        for k, policy in CASES[1:2] if name in AXES else CASES:
            set_checkpointing(made.model, policy)
            losses = [
                each.forward_backward(make_micro_batches(tokens, each, k, loops))["objective"]
                for each in (made, single)
            ]
            gradients, expected = made.full_gradients(), single.full_gradients()
            assert set(gradients) == set(expected)
            pairs = [(losses[0], losses[1]), *((gradients[key], expected[key]) for key in expected)]
            worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
            for each in (made, single):
                each.clip(1.0)
                each.step(1e-3)
        verdict[name] = {"worst": worst, "graphs": counters["stats"]["unique_graphs"]}
        verdict[name]["breaks"] = len(counters["graph_break"])
        assert all(layer.compiled is not None for layer in made.model.core.layers)
        made.barrier()
    return verdict
