"""Count the collectives of optimizer steps of every engine; runs on every rank."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.tools.collective_cases import COMPARISONS, build_case
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.parallel import Engine, MicroBatch
from megatron_rdt.parallel.collective_counter import Collective, record_collectives, sum_by_kind
from tests.distributed.engine_worker import MODEL
from tests.distributed.reference import relative_difference

SEQUENCES, MICRO_BATCH = 12, 3  # two micro-batches on each of two ranks
LOOPS = (1, 4, 16)
# (T, k, checkpointing)
CASES = [
    *((loops, None, "none") for loops in LOOPS),
    *((loops, 2, "per_iteration") for loops in (1, 64)),
    (16, 2, "none"),
    (16, None, "per_iteration"),
]
CHANGING = (3, 1, 7, 2, 5)
# T of the two micro-batches of a step on rank 0 and on rank 1.
DIFFERENT = (((1, 16), (5, 2)), ((16, 1), (1, 1)))


def build(label: str) -> Engine:
    """The engine of a label, for the sizes of these tests."""
    return build_case(label, MODEL, SEQUENCES, MICRO_BATCH)


def make_micro_batches(
    tokens: torch.Tensor, rank: int, loops: Sequence[int], k: int | None = None, masked: bool = False
) -> list[MicroBatch]:
    """The micro-batches of one rank; `loops` has the T of each."""
    mine = tokens[rank * len(tokens) // 2 : (rank + 1) * len(tokens) // 2].split(MICRO_BATCH)
    return [
        MicroBatch(Batch(part, loss_mask=part % 3 == 0 if masked else None), DepthPlan((t,) * len(part), k))
        for part, t in zip(mine, loops)
    ]


def gather_sums(calls: list[Collective]) -> list[dict[str, tuple[int, int]]]:
    """Gather every rank's calls and bytes by phase and kind."""
    found: list[dict[str, tuple[int, int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, sum_by_kind(calls))
    return found


def count_cases(engine: Engine, tokens: torch.Tensor, cases: Sequence[tuple]) -> dict[str, dict[str, object]]:
    """Count the collectives of each case: all of them on every rank, and those of exactly the core's size."""
    size = 4 * sum(p.numel() for p in build("single").model.core.parameters())
    counted: dict[str, dict[str, object]] = {}
    for loops, k, checkpointing in cases:
        set_checkpointing(engine.model, checkpointing)
        calls = record_collectives(engine, make_micro_batches(tokens, engine.rank, (loops, loops), k))
        core = {key: number for key, (number, _) in sum_by_kind(call for call in calls if call.size == size).items()}
        counted[f"T={loops} k={k or 'all'} checkpointing={checkpointing}"] = {"ranks": gather_sums(calls), "core": core}
    set_checkpointing(engine.model, "none")
    return counted


def count_engine(label: str, tokens: torch.Tensor) -> dict[str, object]:
    """Count every case on one engine; a comparison runs those with full backpropagation only."""
    engine = build(label)
    for _ in range(2):
        record_collectives(engine, make_micro_batches(tokens, engine.rank, (1, 1)))
    if label in COMPARISONS:
        return {"cases": count_cases(engine, tokens, CASES[: len(LOOPS)])}
    cases = count_cases(engine, tokens, CASES)

    def count(loops: Sequence[int], masked: bool = False) -> list[dict[str, tuple[int, int]]]:
        return gather_sums(record_collectives(engine, make_micro_batches(tokens, engine.rank, loops, masked=masked)))

    changing = [count((t, t)) for t in CHANGING]
    differing = [count(loops[engine.rank]) for loops in DIFFERENT]
    masked = [count((t, 1), masked=True) for t in (1, 16)]
    error = measure_gradient_error(build(label), tokens)
    return {
        "cases": cases,
        "changing": changing,
        "differing": differing,
        "masked": masked,
        "gradient_error": error,
    }


def measure_gradient_error(engine: Engine, tokens: torch.Tensor) -> float:
    """Largest relative error of a gradient when each rank and micro-batch has its own T, against one process."""
    single = build("single")
    engine.forward_backward(make_micro_batches(tokens, engine.rank, DIFFERENT[0][engine.rank]))
    single.forward_backward([part for rank in (0, 1) for part in make_micro_batches(tokens, rank, DIFFERENT[0][rank])])
    reference = single.full_gradients()
    gradients = engine.full_gradients()
    assert set(gradients) == set(reference)
    return max(relative_difference(gradient, reference[name]) for name, gradient in gradients.items())


def count_engines(labels: Sequence[str]) -> dict[str, Any]:
    """Count every case on the engines of these labels, and the bytes and parameters of the model."""
    warnings.simplefilter("ignore")
    tokens = torch.randint(0, MODEL.vocab_size, (SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    sizes = [parameter.numel() for parameter in build("single").model.parameters()]
    verdict: dict[str, Any] = {"model_bytes": 4 * sum(sizes), "parameters": len(sizes)}
    for label in labels:
        verdict[label] = count_engine(label, tokens)
    return verdict
