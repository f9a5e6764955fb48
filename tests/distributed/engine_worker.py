"""Compare one engine with one process in every case; runs on every rank."""

import dataclasses

import torch

from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.parallel import Engine, MicroBatch
from tests.distributed.reference import build_on_cpu, relative_difference

MODEL = ModelConfig(vocab_size=61, dim=32, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2)
PARTS = {
    "plain": {},
    "experts": {"core_ffn": "moe", "experts": 4, "experts_per_token": 2, "expert_dim": 24},
    # The exit gate reads the logits of every iteration; value embeddings have tables in the prelude and the coda too.
    "gate": {"halting": "gate", "window": 5, "value_embeddings": "gated", "state_init": "learned"},
}
SEQUENCES = 12
SIZES = (6, 2)
# T of each sequence: of two ranks, one has a far larger T than the other in every micro-batch.
MIXED = (9, 1, 4, 7, 2, 8, 1, 1, 2, 1, 3, 1)
Loops = int | tuple[int, ...]
# (T, k, checkpointing, sequences per micro-batch)
CASES: list[tuple[Loops, int | None, int | str, int]] = [
    (1, None, "none", 6),
    (2, None, "per_iteration", 2),
    (5, None, "none", 2),
    (5, 2, "none", 6),
    (5, 2, "per_iteration", 2),
    (MIXED, None, "none", 6),
    (MIXED, 3, "none", 2),
    (MIXED, 2, "per_iteration", 2),
    (MIXED, 3, "per_layer", 2),
    (MIXED, None, "selective", 6),
    (MIXED, None, 3, 2),
]
# One T in a forward pass, another in the next and on the other rank; T = 1 everywhere.
BY_MICRO_BATCH = (2, 2, 5, 5, 3, 3, 7, 7, 2, 2, 1, 1)
GATE_CASES: list[tuple[Loops, int | None, str, int]] = [
    (1, None, "none", 2),
    (BY_MICRO_BATCH, None, "none", 2),
    (BY_MICRO_BATCH, 2, "per_iteration", 2),
]


def build(name: str, size: int, precision: str = "float32", model: ModelConfig = MODEL) -> Engine:
    """An engine for micro-batches of `size` sequences."""
    config = RunConfig(
        model=model,
        depth=DepthConfig(),
        train=TrainConfig(global_batch=SEQUENCES, micro_batch=size, precision=precision),
        parallel=ParallelConfig(engine=name),
    )
    return build_on_cpu(config)


def make_micro_batches(
    tokens: torch.Tensor, engine: Engine, size: int, loops: Loops, k: int | None
) -> list[MicroBatch]:
    """This rank's micro-batches of a step; those with T = 5 have documents, those with T = 5 or k = 2 a loss mask."""
    share = len(tokens) // engine.world_size
    first = engine.rank * share
    mine, each = tokens[first : first + share], (loops,) * len(tokens) if isinstance(loops, int) else loops
    documents = (mine % 5 == 0).cumsum(-1)
    # Ranks have different numbers of counted targets, and some sequences have none.
    mask = (mine % 3 == 0) & (torch.arange(first, first + share) > 3)[:, None]
    return [
        MicroBatch(
            Batch(
                mine[at : at + size],
                documents[at : at + size] if loops == 5 else None,
                loss_mask=mask[at : at + size] if loops == 5 or k == 2 else None,
            ),
            DepthPlan(each[first + at : first + min(at + size, share)], k),
        )
        for at in range(0, share, size)
    ]


def compare_cases(engine: Engine, single: Engine | None, size: int, tokens: torch.Tensor) -> dict[str, float]:
    """Largest relative difference of loss, norm and every gradient, over the cases of this micro-batch size."""
    worst: dict[str, float] = {}
    gate = engine.model.config.halting == "gate"
    for loops, k, checkpointing, case_size in GATE_CASES if gate else CASES:
        if case_size != size:
            continue
        set_checkpointing(engine.model, checkpointing)
        loss = engine.forward_backward(make_micro_batches(tokens, engine, size, loops, k))["objective"]
        gradients, norm = engine.full_gradients(), engine.clip(0.5)
        engine.step(1e-3)
        if single is None:
            continue
        whole = size if gate else len(tokens)
        expected = single.forward_backward(make_micro_batches(tokens, single, whole, loops, k))["objective"]
        reference = single.full_gradients()
        assert set(gradients) == set(reference), set(gradients) ^ set(reference)
        for name, gradient in gradients.items():
            worst[name] = max(worst.get(name, 0.0), relative_difference(gradient, reference[name]))
            assert gate or float(gradient.abs().max()) > 0, name
        worst["norm"] = max(worst.get("norm", 0.0), relative_difference(norm, single.clip(0.5)))
        worst["loss"] = max(worst.get("loss", 0.0), relative_difference(loss, expected))
        single.step(1e-3)
    return worst


def check_discard(engine: Engine, single: Engine | None, tokens: torch.Tensor, decided: bool) -> float:
    """Largest difference of the gradients after a step that was thrown away, from those of a process that never took it.

    The step is thrown away by the optimizer, if `decided` on the device, or by the caller.
    """
    size = engine.config.train.micro_batch
    engine.forward_backward(make_micro_batches(tokens.flip(1), engine, size, 4, None))
    engine.clip(1.0)
    if decided:
        engine.step(1.0, torch.tensor(False))
    else:
        engine.discard_gradients()
    engine.forward_backward(make_micro_batches(tokens, engine, size, 2, None))
    gradients, reference = engine.full_gradients(), {}
    if single is not None:
        single.forward_backward(make_micro_batches(tokens, single, len(tokens), 2, None))
        reference = single.full_gradients()
    for each in filter(None, (engine, single)):
        each.clip(1.0)
        each.discard_gradients()
    return max((relative_difference(gradients[name], reference[name]) for name in reference), default=0.0)


def compare_other_batches(engine: Engine, single: Engine | None, tokens: torch.Tensor) -> float:
    """Largest difference of a gradient in steps of fewer and of more micro-batches than `train.global_batch` has."""
    size, worst = engine.config.train.micro_batch, 0.0
    for batch in (tokens[: size * engine.world_size], torch.cat([tokens, tokens.flip(0)])):
        engine.forward_backward(make_micro_batches(batch, engine, size, 3, None))
        gradients, norm = engine.full_gradients(), engine.clip(1.0)
        engine.step(1e-3)
        if single is not None:
            single.forward_backward(make_micro_batches(batch, single, len(batch), 3, None))
            reference = single.full_gradients()
            worst = max(worst, relative_difference(norm, single.clip(1.0)))
            worst = max(worst, *(relative_difference(gradients[name], reference[name]) for name in reference))
            single.step(1e-3)
    return worst


def compare_bfloat16(name: str, tokens: torch.Tensor) -> dict[str, float]:
    """Largest relative difference of the loss and of any gradient; rounding differs with the size of the batch."""
    engine, single = build(name, 2, "bfloat16"), build("single", 2, "bfloat16")
    loss = engine.forward_backward(make_micro_batches(tokens, engine, 2, 4, 2))["objective"]
    expected = single.forward_backward(make_micro_batches(tokens, single, 2, 4, 2))["objective"]
    gradients, reference = engine.full_gradients(), single.full_gradients()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return {
        "loss": relative_difference(loss, expected),
        "gradient": max(relative_difference(gradient, reference[key]) for key, gradient in gradients.items()),
    }


def check_engine(name: str, part: str) -> dict[str, object]:
    """Run every case of a part of the model on one engine; rank 0 compares with one process and returns the findings.

    Parts other than "plain" run with the smaller micro-batches only.
    """
    tokens = torch.randint(0, 61, (SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    verdict: dict[str, object] = {}
    model, plain = dataclasses.replace(MODEL, **PARTS[part]), part == "plain"
    for size in SIZES if plain else SIZES[1:]:
        engine = build(name, size, model=model)
        # The first rank's verdict is the one that is read, so it alone computes the reference.
        single = build("single", size, model=model) if engine.rank == 0 else None
        differences = verdict[f"differences_{size}"] = compare_cases(engine, single, size, tokens)
        verdict[f"discard_{size}"] = max(check_discard(engine, single, tokens, decided) for decided in (False, True))
        if engine.model.config.halting == "none":
            differences["other batches"] = compare_other_batches(engine, single, tokens)
        verdict["world_size"] = engine.world_size
    if plain:  # rounded, a token may choose other experts
        verdict["bfloat16"] = compare_bfloat16(name, tokens)
    return verdict
