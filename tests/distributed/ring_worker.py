"""Worker for the processes of a loop ring: compares it with one process, in float64."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rdt.checkpoint.buffers import persistent_buffers
from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig, check_config
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.depth.hashing import hash64
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.moe import rebalance
from megatron_rdt.parallel import Engine, MicroBatch, make_engine
from megatron_rdt.parallel.torch_engine import full_tensor
from tests.distributed.reference import relative_difference

PLAIN = ModelConfig(vocab_size=64, dim=32, prelude_layers=1, core_layers=4, coda_layers=1, heads=4, kv_heads=2)
MODELS = {
    "diagonal": PLAIN,
    "linear": dataclasses.replace(PLAIN, injection="linear", norm_placement="sandwich", core_norm="last_shared"),
    "add": dataclasses.replace(PLAIN, injection="add", core_norm="iteration", state_init="embedding"),
    "residual": dataclasses.replace(PLAIN, injection="residual", state_init="learned", signals=["lora", "sinusoidal"]),
    "hyper": dataclasses.replace(
        PLAIN, injection="hyper", lanes=2, state_init="normal", signals=["adaln"], input_matrix=True, output_matrix=True
    ),
    "gate": dataclasses.replace(PLAIN, injection="gate", window=5, tie_embeddings=False, core_norm="last"),
    "none": dataclasses.replace(
        PLAIN, injection="none", state_init="encoded", encoded_norm=False, core_norm="iteration"
    ),
    "values": dataclasses.replace(
        PLAIN, value_embeddings="gated", window=7, qk_norm="learned", qk_bias=True, norm_placement="peri"
    ),
    "experts": dataclasses.replace(PLAIN, core_ffn="moe", experts=4, shared_experts=1, injection="add"),
    "mla": dataclasses.replace(PLAIN, attention="mla", kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, core_layers=8),
}
SEQUENCES, LENGTH = 8, 12
VALIDATED = [1, 3]
MIXED = (3, 1, 2, 5, 1, 1, 2, 4)
# T of the sequences, k, activation checkpointing, sequences of a micro-batch, True with documents and a loss mask.
Step = tuple[tuple[int, ...], int | None, str, int, bool]
STEPS: list[Step] = [
    ((3,) * SEQUENCES, None, "none", 2, False),
    (MIXED, 2, "none", 1, True),
    (MIXED, None, "per_iteration", 2, False),
    (MIXED, 1, "per_layer", 1, False),
    (MIXED[::-1], 3, "selective", 2, True),
]
FULL_STEPS = [(loops, None, *rest) for loops, _, *rest in STEPS]


def make(parallel: ParallelConfig, model: ModelConfig, processes: int, precision: str = "float32") -> Engine:
    """Build an engine for a model; "float32" computes in the dtype of the weights, here float64."""
    config = RunConfig(
        model=model,
        depth=DepthConfig(per="sequence"),
        train=TrainConfig(
            global_batch=SEQUENCES, micro_batch=1, sequence_length=LENGTH, z_loss=0.01, precision=precision
        ),  # type: ignore[arg-type]
        parallel=parallel,
    )
    check_config(config, processes)
    engine = make_engine(config, torch.device("cpu"))
    if parallel.engine == "single":  # the reference sees everything, also inside a process group
        engine.rank, engine.world_size = 0, 1
        engine.layout = dataclasses.replace(engine.layout, shard=1)
    with torch.device("meta"):
        built = RecurrentDepthTransformer(model)
    engine.setup(built)
    return engine


def make_micro_batches(engine: Engine, tokens: torch.Tensor, step: Step, size: int) -> list[MicroBatch]:
    """Return this rank's share of the tokens as micro-batches of `size` sequences, with the T of the ring's processes."""
    loops, k, _, _, packed = step
    layout, share = engine.layout, SEQUENCES // engine.layout.data
    data_rank, result = layout.data_rank(engine.rank), []
    columns = torch.arange(LENGTH + 1).expand_as(tokens)
    starts = tokens % 5 == 0
    fields = {
        "documents": starts.cumsum(-1),
        "positions": columns - torch.where(starts, columns, 0).cummax(-1).values,
        "loss_mask": (tokens % 3 != 0) & (torch.arange(SEQUENCES) < SEQUENCES - 1)[:, None],
    }
    for at in range(0, share, size):
        starts = [peer * share + at for peer in layout.ring_data_ranks(data_rank)]
        rows = slice(data_rank * share + at, data_rank * share + at + size)
        batch = Batch(tokens[rows], **({name: each[rows] for name, each in fields.items()} if packed else {}))
        seeds = tuple(hash64(1, "state", sample) for sample in range(rows.start, rows.stop))
        peers = tuple(loops[start : start + size] for start in starts) if layout.ring > 1 else ()
        result.append(MicroBatch(batch, DepthPlan(loops[rows], k, seeds, peers)))
    return result


def train_step(engine: Engine, tokens: torch.Tensor, step: Step, size: int) -> dict[str, torch.Tensor]:
    """Take an optimizer step; return losses, norm and gradients."""
    set_checkpointing(engine.model, step[2])
    losses = engine.forward_backward(make_micro_batches(engine, tokens, step, size))
    results = {f"loss {name}": value for name, value in losses.items()} | engine.full_gradients()
    results["norm"] = engine.clip(0.5)
    engine.step(1e-3)
    rebalance(engine.model, 0.5, engine.sum_over_ranks)
    return results


def compare(parallel: dict[str, Any], name: str, processes: int) -> dict[str, float]:
    """Return the largest relative differences from one process, of everything in all steps and the validation after them."""
    model, tokens = MODELS[name], make_tokens()
    ring = make(ParallelConfig(**{"engine": "fsdp", **parallel}), model, processes)
    # Only the first rank's result is read, so it alone computes the reference.
    single = make(ParallelConfig(), model, 1) if ring.rank == 0 else None
    worst: dict[str, float] = {}
    for step in FULL_STEPS if name == "none" else STEPS:
        found = train_step(ring, tokens, step, min(step[3], SEQUENCES // ring.layout.data))
        if single is not None:
            expected = train_step(single, tokens, step, SEQUENCES)
            assert set(found) == set(expected), set(found) ^ set(expected)
            for key, value in expected.items():
                worst[key] = max(worst.get(key, 0.0), relative_difference(found[key], value))
    found = validate(ring, tokens)
    if single is not None:
        expected = validate(single, tokens)
        is_split = ring.layout.tensor * ring.layout.context > 1  # then each rank measures its own tokens
        # The monitor measures in float32.
        worst |= {
            key: relative_difference(found[key], value) * (1 if key == "validation" else 1e-5)
            for key, value in expected.items()
            if key == "validation" or not is_split
        }
    return worst


@torch.no_grad()
def validate(engine: Engine, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the losses of two sequences at several T, and what the monitor measures of them, by name."""
    inputs, targets, monitor = tokens[:2, :-1], tokens[:2, 1:], CoreMonitor()
    losses = engine.module(inputs, loops=VALIDATED, targets=targets)["cross_entropy"]
    engine.module(inputs, DepthPlan((2, 5), state_seeds=(1, 2)), targets=targets, monitor=monitor)
    measured = {name: torch.tensor(value) for name, value in monitor.readings().items()}
    return {"validation": engine.sum_over_ranks(losses) / engine.world_size, **measured}


def make_tokens() -> torch.Tensor:
    """Return the tokens of all sequences."""
    return torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def compare_all(cases: list[tuple[dict[str, Any], str]], processes: int) -> dict[str, dict[str, float]]:
    """Run `compare` for each case in float64; return the results by the name of the case."""
    torch.set_default_dtype(torch.float64)
    return {f"{parallel} {model}": compare(parallel, model, processes) for parallel, model in cases}


def collect_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Return every parameter and its moments by name, unsharded; of every stage on every rank."""
    found: dict[str, torch.Tensor] = {}
    states = {p: state for optimizer in engine.optimizers for p, state in optimizer.state.items()}  # type: ignore[attr-defined]
    for name, parameter in engine.model.named_parameters():
        for key, value in {"": parameter, **states[parameter]}.items():
            found[f"{name} {key}"] = full_tensor(value).detach().clone()
    found |= {name: buffer.clone() for name, buffer in persistent_buffers(engine.model).items()}
    every: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, found)
    return {name: value for each in every for name, value in each.items()}


def exchange_checkpoints(folder: Path, stages: int, processes: int) -> list[str]:
    """Save a ring, load it without one, save that, load it with other rings; return the names of what changed."""
    tokens, engines = make_tokens(), []
    rings: list[dict[str, Any]] = [
        {"core_ring": stages},
        {},
        {"core_ring": 2, "tensor": processes // 2},
        {"core_ring": 2, "replicate": processes // 2},
    ]
    for number, parallel in enumerate(rings):
        model = dataclasses.replace(MODELS["residual"], core_ffn="moe", experts=4)
        engine = make(ParallelConfig(**{"engine": "fsdp", **parallel}), model, processes)
        assert len(persistent_buffers(engine.model)) == model.core_layers, "rank 0 saves those of all stages"
        if number == 0:
            for step in STEPS[:2]:
                train_step(engine, tokens, step, 1)
        else:
            engine.load(folder / f"{number - 1}")
        engine.save(folder / f"{number}")
        engines.append(engine)
    first, *others = (collect_state(engine) for engine in engines)
    assert len(first) > 200
    assert all(set(other) == set(first) for other in others)
    changed = [name for other in others for name, value in first.items() if not torch.equal(other[name], value)]
    losses = [train_step(engine, tokens, STEPS[2], 1)["loss cross_entropy"] for engine in engines]
    return changed + [f"loss {loss - losses[0]}" for loss in losses if abs(loss - losses[0]) > 1e-5]


def compare_bfloat16(parallel: dict[str, Any], processes: int) -> dict[str, float]:
    """Return the relative differences of losses and gradients from one process, both computing in bfloat16."""
    tokens, model = make_tokens(), MODELS["linear"]
    found, expected = (
        train_step(engine, tokens, STEPS[2], size)
        for engine, size in (
            (make(ParallelConfig(**{"engine": "fsdp", **parallel}), model, processes, "bfloat16"), 2),
            (make(ParallelConfig(), model, 1, "bfloat16"), SEQUENCES),
        )
    )
    return {name: relative_difference(found[name], value) for name, value in expected.items()}


def ask_for_hidden_states(parallel: dict[str, Any], processes: int) -> str:
    """Ask a ring for the states of every iteration; return the error."""
    engine = make(ParallelConfig(**{"engine": "fsdp", **parallel}), PLAIN, processes)
    with pytest.raises(RuntimeError) as raised:
        engine.module(make_tokens()[:2], 2, states=[])
    return str(raised.value)
