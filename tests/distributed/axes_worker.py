"""Worker for four processes: compares every arrangement of them with one process, in float64."""

import dataclasses
from typing import Any

import torch

from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.depth.hashing import hash64
from megatron_rdt.evaluate.row_scores import score_rows, share_among_ranks
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.parallel import Engine, MicroBatch, make_engine

PLAIN = ModelConfig(vocab_size=64, dim=32, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=4)
MODELS = {
    "plain": PLAIN,
    "parts": dataclasses.replace(
        PLAIN,
        qk_norm="learned",
        qk_bias=True,
        value_embeddings="gated",
        window=9,
        norm_placement="sandwich",
        core_norm="last_shared",
        injection="hyper",
        lanes=2,
        input_matrix=True,
        output_matrix=True,
        state_init="normal",
        signals=["sinusoidal", "lora", "adaln"],
        tie_embeddings=False,
        logit_softcap=5.0,
        ffn="relu2",
    ),
    "mla": dataclasses.replace(
        PLAIN, attention="mla", kv_rank=16, query_rank=24, nope_dim=8, rope_dim=4, value_dim=8, state_init="learned"
    ),
    "experts": dataclasses.replace(PLAIN, core_ffn="moe", experts=4, experts_per_token=2, expert_dim=24),
    # Fewer experts than processes: FSDP2 shards the rows of each.
    "few experts": dataclasses.replace(PLAIN, core_ffn="moe", experts=3, experts_per_token=2, expert_dim=24),
    "experts act": dataclasses.replace(
        PLAIN, core_ffn="moe", experts=4, experts_per_token=2, expert_dim=25, shared_expert_dim=24, halting="act"
    ),
    "act": dataclasses.replace(PLAIN, halting="act", injection="linear"),
    "gate": dataclasses.replace(PLAIN, halting="gate", injection="gate"),
}
SEQUENCES, LENGTH = 8, 16
VALIDATED = [1, 2, 4]  # loop counts of one evaluation
Case = tuple[dict[str, Any], str, str]
"""Options of `parallel`, name of the model, precision."""
MIXED = (3, 1, 2, 4, 1, 1, 2, 3)
# (T of the sequences, k, checkpointing, True with documents that have positions of their own, and a loss mask)
STEPS = [
    ((3,) * SEQUENCES, None, "none", False),
    (MIXED, 2, "per_iteration", True),
    (MIXED, None, "per_layer", False),
]
# One T for all sequences: for axes whose ranks communicate in every iteration, and for the gate.
EVEN_STEPS = [((t,) * SEQUENCES, k, *rest) for t, ((*_,), k, *rest) in zip((3, 4, 1), STEPS)]


def make(parallel: ParallelConfig, model: ModelConfig, precision: str = "float32") -> Engine:
    config = RunConfig(
        model=model,
        depth=DepthConfig(),
        train=TrainConfig(
            global_batch=SEQUENCES, micro_batch=1, sequence_length=LENGTH, z_loss=0.01, precision=precision
        ),
        parallel=parallel,
    )
    engine = make_engine(config, torch.device("cpu"))
    if parallel.engine == "single":  # the reference sees everything, also inside a process group
        engine.rank, engine.world_size = 0, 1
        engine.layout = dataclasses.replace(engine.layout, shard=1)
    with torch.device("meta"):
        built = RecurrentDepthTransformer(config.model)
    engine.setup(built)
    return engine


def batch(engine: Engine, tokens: torch.Tensor, step: tuple, size: int) -> list[MicroBatch]:
    loops, k, _, packed = step
    share = SEQUENCES // engine.layout.data
    first = engine.layout.data_rank(engine.rank) * share
    documents = (tokens % 7 == 0).cumsum(-1)
    columns = torch.arange(LENGTH + 1).expand_as(tokens)
    named = {
        "documents": documents,
        "positions": columns - torch.where(tokens % 7 == 0, columns, 0).cummax(-1).values,
        # Sequences, and so ranks, differ in how many targets count; in the last two none does.
        "loss_mask": (tokens % 3 != 0) & (torch.arange(SEQUENCES) < SEQUENCES - 2)[:, None],
    }
    result = []
    for at in range(first, first + share, size):
        rows = slice(at, at + size)
        seeds = tuple(hash64(1, "state", sample) for sample in range(at, at + size))
        parts = {name: values[rows] for name, values in named.items()} if packed else {}
        result.append(
            MicroBatch(
                Batch(tokens[rows], **parts, padding=tuple(range(SEQUENCES))[rows]), DepthPlan(loops[rows], k, seeds)
            )
        )
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def compare(parallel: ParallelConfig, name: str, precision: str, tokens: torch.Tensor) -> dict[str, float]:
    """Return the largest relative differences of losses, norm and gradients over three steps, and of the weights after them.

    In bfloat16, those of one step.
    """
    model = MODELS[name]
    even = parallel.core_gather != "once" or parallel.expert > 1 or model.halting == "gate"
    engine = make(parallel, model, precision)
    # Only the first rank's result is read, so it alone computes the reference.
    single = make(ParallelConfig(engine="single"), model, precision) if engine.rank == 0 else None
    size = max(2, SEQUENCES // engine.layout.data // 2)  # two micro-batches, or one where there are four shares
    worst: dict[str, float] = {}

    def note(what: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
        worst[what] = max(worst.get(what, 0.0), difference(torch.as_tensor(ours), torch.as_tensor(reference)))

    for step in EVEN_STEPS if even else STEPS:
        if model.halting != "none":
            step = (step[0], None, *step[2:])
        set_checkpointing(engine.model, step[2])
        losses = engine.forward_backward(batch(engine, tokens, step, size))
        gradients, norm = engine.full_gradients(), engine.clip(0.5)
        if single is not None:
            set_checkpointing(single.model, step[2])
            expected = single.forward_backward(batch(single, tokens, step, SEQUENCES))
            reference = single.full_gradients()
            assert set(losses) == set(expected)
            assert set(gradients) == set(reference), set(gradients) ^ set(reference)
            for key in losses:
                note(f"loss {key}", losses[key], expected[key])
            for key, gradient in gradients.items():
                note(key, gradient, reference[key])
            note("norm", norm, single.clip(0.5))
        if precision == "bfloat16":  # AdamW's first step follows the sign of a gradient even where that is rounding
            return worst
        engine.step(1e-3)
        if single is not None:
            single.step(1e-3)
    state = {key: (v.full_tensor() if hasattr(v, "full_tensor") else v) for key, v in engine.model.state_dict().items()}
    rows = slice(0, 2)  # as in validation, the same T for every sequence
    named = {"targets": tokens[rows, 1:], "loss_mask": tokens[rows, 1:] % 3 != 0}
    with torch.no_grad():
        engine.model.eval()
        total = engine.module(tokens[rows, :-1], loops=VALIDATED, **named)["cross_entropy"]
        mean = engine.sum_over_ranks(total) / engine.world_size
        if single is not None:
            for key, value in single.model.state_dict().items():
                note(f"weights {key}", state[key], value)
            single.model.eval()
            alone = [single.module(tokens[rows, :-1], t, **named)["cross_entropy"] for t in VALIDATED]
            note("validation", mean, torch.stack(alone))
        # Rows whose number no rank count divides, and columns that are padded.
        ragged = Batch(tokens[:5, :14], loss_mask=tokens[:5, :14] % 3 != 0)
        scores = score_rows(engine.module, ragged, VALIDATED, 2, engine.device, share_among_ranks(engine))
        for t in VALIDATED if single is not None else ():
            expected_scores = score_rows(single.module, ragged, [t], 5, single.device)[t]
            note(f"losses of rows at {t}", scores[t].losses, expected_scores.losses)
            note(f"misses of rows at {t}", scores[t].misses, expected_scores.misses)
    return worst


def compare_all(cases: list[Case]) -> dict[str, dict[str, float]]:
    """Run `compare` for each case, in float64, and return its results by the name of the case."""
    torch.set_default_dtype(torch.float64)
    tokens = torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return {
        f"{parallel} {model} {precision}": compare(
            ParallelConfig(**{"engine": "fsdp", **parallel}), model, precision, tokens
        )
        for parallel, model, precision in cases
    }
