"""Losses at several T of one call: those of a call for each T, bit for bit, in as many iterations as the largest T."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.halting.exit_rules import ExitTrace

LOOPS = [1, 2, 5, 6]
Build = Callable[..., RecurrentDepthTransformer]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"injection": "residual", "state_init": "normal"},
    {"injection": "linear", "core_norm": "last_shared", "norm_placement": "sandwich", "state_init": "normal"},
    {"injection": "add", "state_init": "embedding", "coda_layers": 0},
    {"injection": "gate", "state_init": "encoded", "core_norm": "iteration", "prelude_layers": 0},
    {"injection": "hyper", "lanes": 3, "state_init": "learned", "core_norm": "last"},
    {"discretization": "euler", "input_matrix": True, "output_matrix": True, "value_embeddings": "gated"},
    {"signals": ["sinusoidal", "lora"], "norm_placement": "peri", "qk_norm": "learned", "qk_bias": True},
    {"signals": ["adaln", "sinusoidal"], "state_init": "learned"},
    {"halting": "act", "halting_threshold": 0.6, "core_norm": "last", "injection": "hyper"},
    {"halting": "act", "signals": ["adaln"]},
    {"halting": "gate", "core_norm": "last_shared", "output_matrix": True},
    {"attention": "mla", "kv_rank": 10, "nope_dim": 4, "rope_dim": 6, "value_dim": 5, "window": 3},
    {"core_ffn": "moe", "experts": 4, "experts_per_token": 2, "tie_embeddings": False, "logit_softcap": 5.0},
]


def make_inputs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens (2, 6) and targets with a mask and two documents in the second row."""
    tokens = torch.randint(0, 37, (2, 7), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1]])
    loss_mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    return tokens[:, :-1], {"targets": tokens[:, 1:], "documents": documents, "loss_mask": loss_mask}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_losses_are_those_of_a_call_for_each(options: dict[str, Any], dtype: str, small: Build) -> None:
    model = small(**options).eval()
    if dtype != "float64":
        model.float()
    if dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    tokens, named = make_inputs()
    for per_row in (False, True):
        together = model(tokens, loops=LOOPS, per_row=per_row, **named)
        alone = [model(tokens, t, per_row=per_row, **named) for t in LOOPS]
        assert together.keys() == alone[0].keys()
        for name, values in together.items():
            assert torch.equal(values, torch.stack([each[name] for each in alone])), name
    assert len(set(together["cross_entropy"][:, 0].tolist())) == len(LOOPS)  # T makes a difference
    some = model(tokens, loops=(2, 6), per_row=True, **named)
    assert torch.equal(some["cross_entropy"], together["cross_entropy"][[1, 3]])


@pytest.mark.parametrize("policy", ["none", "per_iteration", "selective", "per_layer", 2, 3])
@torch.no_grad()
def test_activation_checkpointing_changes_nothing(policy: int | str, small: Build) -> None:
    model = small(halting="act").eval()
    tokens, named = make_inputs()
    expected = model(tokens, loops=LOOPS, **named)
    set_checkpointing(model, policy)
    for name, values in model(tokens, loops=LOOPS, **named).items():
        assert torch.equal(values, expected[name])


@pytest.mark.parametrize(("signals", "iterations"), [(["sinusoidal", "lora"], 6), (["adaln"], 1 + 2 + 5 + 6)])
@torch.no_grad()
def test_iterations_are_shared_where_none_depends_on_the_largest_t(
    signals: list[str], iterations: int, small: Build
) -> None:
    model, calls = small(signals=signals).eval(), dict.fromkeys(("prelude", "core", "coda"), 0)

    def count(name: str) -> Callable[..., None]:
        def add_call(*_: object) -> None:
            calls[name] += 1

        return add_call

    for name, layer in (("prelude", model.prelude[0]), ("core", model.core.layers[0]), ("coda", model.coda[0])):
        layer.register_forward_hook(count(name))
    tokens, named = make_inputs()
    model(tokens, loops=LOOPS, **named)
    assert calls == {"prelude": 1, "core": iterations, "coda": len(LOOPS)}


@pytest.mark.parametrize("halting", ["none", "act", "gate"])
@torch.no_grad()
def test_states_are_not_kept_for_later(halting: str, small: Build) -> None:
    model, outputs, alive = small(halting=halting).eval(), [], []

    def remember(module: object, arguments: object, output: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output[0]))

    model.core.register_forward_hook(remember)
    tokens, named = make_inputs()
    model(tokens, loops=list(range(1, 9)), **named)
    assert len(alive) == 8
    assert max(alive) <= 1, "the state of one T is held while the next is reached, no more"


def test_several_loops_are_for_measuring_only(small: Build) -> None:
    model = small()
    tokens, named = make_inputs()
    with pytest.raises(ValueError, match="several loop counts are for measuring losses"):
        model(tokens, loops=[1, 2], **named)
    with torch.no_grad():
        for extra in ({}, {**named, "trace": ExitTrace()}):
            with pytest.raises(ValueError, match="several loop counts are for measuring losses"):
                model(tokens, loops=[1, 2], **extra)
        for loops in ([], [2, 1], [1, 1]):
            with pytest.raises(ValueError, match="give one T, or several that rise"):
                model(tokens, loops=loops, **named)
        for loops in ([0, 1], [1, 2.5]):
            with pytest.raises(ValueError, match="give a whole number of iterations of at least 1"):
                model(tokens, loops=loops, **named)
