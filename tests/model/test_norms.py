"""Norms of the layers and of the state, and the norms and matrices around the core, against the reference."""

import pytest
import torch

from megatron_rdt.model import CoreMonitor

PLACEMENTS, CORE_NORMS = ("pre", "post", "sandwich", "peri"), ("none", "iteration", "last", "last_shared")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("core_norm", CORE_NORMS)
def test_logits_and_gradients_equal_the_reference(placement, core_norm, agrees) -> None:
    agrees(norm_placement=placement, core_norm=core_norm)


@pytest.mark.parametrize(
    "options",
    [
        {"encoded_norm": False},
        {"input_matrix": True},
        {"output_matrix": True},
        {"scale_embedding": True},
        {"logit_softcap": 3.0},
        {"final_norm": False},
        {
            "final_norm": False,
            "core_norm": "iteration",
            "injection": "none",
            "state_init": "encoded",
            "encoded_norm": False,
        },
        {"output_matrix": True, "core_norm": "last", "input_matrix": True, "encoded_norm": False},
        {"core_norm": "last_shared", "output_matrix": True, "tie_embeddings": False, "logit_softcap": 2.0},
    ],
    ids=str,
)
def test_parts_around_the_core(options, agrees, differs) -> None:
    agrees(**options)
    differs(**options)


@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_each_placement_differs(placement, differs) -> None:
    differs(norm_placement=placement)
    others = {"post": "peri", "sandwich": "peri", "peri": "sandwich"}
    differs(norm_placement=placement, off={"norm_placement": others[placement]})


@pytest.mark.parametrize("core_norm", CORE_NORMS[1:])
def test_each_norm_of_the_state_differs(core_norm, differs) -> None:
    differs(core_norm=core_norm)


def test_a_norm_per_iteration_bounds_the_state(small) -> None:
    """Additive injection, with which the layers make the state grow with T, with and without the norm."""
    sizes = {}
    for kind in ("none", "iteration"):
        model = small(injection="add", core_norm=kind)
        for loops in (1, 200):
            monitor = CoreMonitor()
            with torch.no_grad():
                model(torch.zeros(1, 4, dtype=torch.int64), loops, monitor=monitor)
            sizes[kind, loops] = float(monitor.state_norm)
    assert sizes["none", 200] > 10 * sizes["none", 1]
    assert max(sizes["iteration", loops] for loops in (1, 200)) < 2
