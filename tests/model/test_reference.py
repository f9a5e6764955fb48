"""The model against the reference in reference.py: logits, every gradient, and attention on its own."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.attention.masks import attention_mask
from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.attention.rope import rotate as model_rotate
from megatron_rdt.model.forward_context import LayerContext
from tests.model.reference import Reference, rotate, visible

MLA: dict[str, Any] = {"attention": "mla", "kv_rank": 10, "nope_dim": 4, "rope_dim": 6, "value_dim": 5}
LATENT = [
    MLA,
    MLA | {"query_rank": 7},
    MLA | {"query_rank": 7, "rope_pairing": "adjacent", "window": 3, "rope_base": 50.0},
]
DEFAULT = itertools.product(("zoh", "euler"), ("zero", "normal", "embedding"), (True, False), (2, 4))


@pytest.mark.parametrize(("discretization", "state", "tied", "kv_heads"), DEFAULT)
def test_the_default_model_equals_the_reference(discretization, state, tied, kv_heads, agrees) -> None:
    agrees(discretization=discretization, state_init=state, tie_embeddings=tied, kv_heads=kv_heads)


UNPLACED: list[dict[str, Any]] = [{"positions": "none"}, MLA | {"positions": "none", "query_rank": 7}]
# Three frequencies per head: with these numbers one is fast, one slow, and one in between.
SCALED: dict[str, Any] = {"rope_scaling": "llama3", "rope_base": 50.0, "rope_original_length": 50}


@pytest.mark.parametrize(
    "options",
    [*LATENT, {"window": 3}, {"rope_pairing": "adjacent"}, {"ffn": "relu2"}, {"rope_base": 50.0}, *UNPLACED, SCALED],
    ids=str,
)
def test_other_layers_equal_the_reference(options: dict[str, Any], agrees, differs) -> None:
    agrees(**options)
    differs(**options)


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_rotations_equal_the_reference(pairing: str) -> None:
    x = torch.randn(1, 1, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tables = rotary_tables(torch.arange(9), 8, 50.0, torch.float64)
    torch.testing.assert_close(model_rotate(x, *tables, pairing)[0, 0], rotate(x[0, 0], 50.0, pairing))


@pytest.mark.parametrize("window", [1, 3, 9, 100])
def test_masks_equal_the_reference(window: int) -> None:
    assert torch.equal(attention_mask(9, 0, window, None, torch.device("cpu")), visible(9, window))
    assert torch.equal(visible(9), torch.ones(9, 9, dtype=torch.bool).tril())
    assert attention_mask(9, 0, 0, None, torch.device("cpu")) is None


@pytest.mark.parametrize("options", LATENT, ids=str)
def test_latent_attention_equals_the_reference(
    options: dict[str, Any], small: Callable[..., RecurrentDepthTransformer]
) -> None:
    """On its own, both with expanded keys and values and on the latents, as decoding does."""
    model, x = small(**options), torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attention, config = model.core.layers[0].attention, model.config
    tables = rotary_tables(torch.arange(9), config.rope_dim, config.rope_base, x.dtype)
    mask = attention_mask(9, 0, config.window, None, x.device)
    expected = torch.stack([Reference(model).latent_attention(row, "core.layers.0.attention") for row in x])
    for absorbs in (False, True):
        attention.is_absorbing_cheaper = lambda queries, keys, absorbs=absorbs: absorbs
        found = attention(x, LayerContext(tables, mask, x.dtype, torch.zeros(2, 9)))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
