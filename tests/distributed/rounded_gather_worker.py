"""Compare cores in pieces that are rounded before their gathers with cores rounded after them; runs on every rank."""

import functools
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import linear
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.compiling import compile_layers
from megatron_rdt.parallel import Engine, MicroBatch, engine, fsdp, rounded_gather
from megatron_rdt.parallel.collective_counter import Collective, record_collectives
from tests.distributed.reference import build_on_cpu

PLAIN = ModelConfig(vocab_size=64, dim=32, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=4)
MODELS = {
    "plain": replace(PLAIN, qk_bias=True, norm_placement="sandwich"),
    "mla": replace(PLAIN, attention="mla", kv_rank=16, query_rank=24, nope_dim=8, rope_dim=4, value_dim=8),
    "experts": replace(PLAIN, core_ffn="moe", experts=4, experts_per_token=2, expert_dim=24, shared_expert_dim=16),
}
Step = tuple[int, int | None, str]
"""T, which is that of all ranks, k, checkpointing."""
STEPS: tuple[Step, ...] = (
    (3, None, "none"),
    (4, 2, "per_iteration"),
    (1, None, "per_layer"),
    (4, 2, "selective"),
)
SEQUENCES, LENGTH = 8, 16
Case = tuple[str, dict[str, Any]]
"""Name of the model, options of `parallel`."""


def multiply_apart() -> Any:
    """Have every product make its own gradient of the input, as those of gathered matrices do: sums are rounded alike."""
    return patch.object(linear, "_multiplies_in_input_dtype", lambda module: False)


def build(model: str, parallel: dict[str, Any], compiled: bool = False) -> Engine:
    """An engine in bfloat16 with two micro-batches per rank."""
    train = TrainConfig(
        global_batch=SEQUENCES,
        micro_batch=1,
        sequence_length=LENGTH,
        precision="bfloat16",
        compile="layers" if compiled else "none",
    )
    options = ParallelConfig(**{"engine": "fsdp", **parallel})
    return build_on_cpu(RunConfig(model=MODELS[model], depth=DepthConfig(per="step"), train=train, parallel=options))


def take_steps(
    made: Engine, tokens: torch.Tensor, steps: tuple[Step, ...] = STEPS
) -> tuple[list[torch.Tensor], list[Collective]]:
    """Take steps; return losses and gradients of each, this rank's final weights and, unless compiled, the collectives."""
    share = SEQUENCES // made.layout.data
    first, half = made.layout.data_rank(made.rank) * share, share // 2
    found: list[torch.Tensor] = []
    calls: list[Collective] = []
    forward_backward = made.forward_backward

    def keep_results(batch: Any) -> dict[str, torch.Tensor]:
        losses = forward_backward(batch)
        found.extend([losses["objective"], *made.full_gradients().values()])
        return losses

    made.forward_backward = keep_results  # type: ignore[method-assign, assignment]
    for loops, k, policy in steps:
        set_checkpointing(made.model, int(policy) if policy.isdigit() else policy)
        parts = [tokens[at : at + half] for at in (first, first + half)]
        batch = [MicroBatch(Batch(part), DepthPlan((loops,) * half, k)) for part in parts]
        if made.config.train.compile == "none":
            calls += record_collectives(made, batch)
        else:  # compiled code cannot be watched
            made.forward_backward(batch)
            made.clip(1.0)
            made.step(1e-3)
    return [*found, *(weight.detach().clone() for weight in made.local_weights())], calls


@multiply_apart()
def compare_gathers(cases: list[Case]) -> list[dict[str, Any]]:
    """Return for each case the results that differ, and the numbers and bytes of the gathers that do."""
    tokens = torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    verdict = []
    for model, parallel in cases:
        ours, calls = take_steps(build(model, parallel), tokens)
        with patch.object(fsdp.FullyShardedEngine, "_gather_dtype", None):
            before, calls_before = take_steps(build(model, parallel), tokens)
        assert [(c.phase, c.kind) for c in calls] == [(c.phase, c.kind) for c in calls_before]
        pairs = [(a, b) for a, b in zip(calls, calls_before) if a.size != b.size]
        whole, _ = take_steps(build(model, parallel | {"core_gather": "once"}), tokens, STEPS[:1])
        assert all(value.isfinite().all() for value in ours)
        verdict.append(
            {
                "compared": len(ours),
                "differing": sum(not torch.equal(a, b) for a, b in zip(ours, before, strict=True)),
                "first loss": ours[0].item(),
                "first loss, gathered once": whole[0].item(),
                "narrower": len(pairs),
                "kinds": sorted({a.kind for a, _ in pairs}),
                "ratios": sorted({b.size / a.size for a, b in pairs}),
            }
        )
    return verdict


@multiply_apart()
def compare_compiled() -> dict[str, Any]:
    """Return the results that differ between compiled layers with the two ways of gathering, graphs and breaks."""
    engine.compile_layers = functools.partial(compile_layers, backend="aot_eager")  # a C++ compiler would take long
    tokens = torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    verdict: dict[str, Any] = {}
    for name, parallel in {"": {}, " tensor 2": {"tensor": 2}}.items():
        for model in ("plain", "experts"):
            torch._dynamo.reset()
            counters.clear()
            made = build(model, {"core_gather": "per_layer", **parallel}, compiled=True)
            ours, _ = take_steps(made, tokens)
            graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
            with patch.object(fsdp.FullyShardedEngine, "_gather_dtype", None):
                torch._dynamo.reset()
                before, _ = take_steps(build(model, {"core_gather": "per_layer", **parallel}, compiled=True), tokens)
            differing = sum(not torch.equal(a, b) for a, b in zip(ours, before, strict=True))
            assert all(layer.compiled is not None for layer in made.model.core.layers)
            verdict[model + name] = {"differing": differing, "graphs": graphs, "breaks": breaks}
    return verdict


def sum_rounded_gradients() -> float:
    """Return how far the gradient of a matrix over many iterations is from the float64 sum, over its largest value.

    Each use's gradient is a row of numbers in bfloat16, positive, and there are many: a sum in bfloat16 would stop growing.
    """
    uses, size = 600, 16
    weight = torch.nn.Parameter(torch.full((size, size), 1 / size).bfloat16())
    weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
    stand_in = rounded_gather._StandIn.apply(weight, torch.float32)
    x = torch.rand(1, size, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    for _ in range(uses):
        linear.linear(x, stand_in, weight.detach()).sum().backward(retain_graph=True)
    expected = uses * x.detach().double().sum(0).expand(size, size)
    assert weight.grad is not None
    return float((weight.grad.double() - expected).abs().max() / expected.max())
