"""Collectives of a step do not depend on T: the core is gathered once per forward and backward pass and reduced once."""

from typing import Any

import pytest

from tests.distributed.collectives_worker import count_engines
from tests.distributed.processes import run_on_processes

ACCUMULATION = 2
REPLICAS, EAGER = "fsdp replicate 2", "fsdp reduce per_micro_batch"
TORCH_ENGINES = ["ddp", "fsdp", "fsdp kept-gathered", REPLICAS, EAGER, "fsdp layer-units"]
ZERO = ["zero1", "zero2", "zero3", "zero3 no-leaf-modules"]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def torch_engines() -> dict[str, Any]:
    return run_on_processes(count_engines, 2, TORCH_ENGINES, timeout=230)[0]


@pytest.fixture(scope="module")
def zero() -> dict[str, Any]:
    return run_on_processes(count_engines, 2, ZERO, timeout=230)[0]


def check_constant(label: str, counted: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Check that every case, every changing T and every mix of T over ranks sends the same; return that."""
    cases = counted[label]["cases"]
    expected = next(iter(cases.values()))["ranks"][0]
    print(f"{label}:", *(f"{key} {number} ({size:,} bytes)" for key, (number, size) in expected.items()), sep="\n  ")
    seen = {name: case["ranks"] for name, case in cases.items()}
    seen |= {f"changing {i}": ranks for i, ranks in enumerate(counted[label]["changing"])}
    seen |= {f"differing {i}": ranks for i, ranks in enumerate(counted[label]["differing"])}
    assert len(seen) == 14
    assert {name: ranks for name, ranks in seen.items() if ranks != [expected, expected]} == {}
    # With masks the ranks tell each other how many targets count, once: eight bytes.
    assert "forward all-reduce" not in expected
    assert counted[label]["masked"] == [[expected | {"forward all-reduce": (1, 8)}] * 2] * 2
    # Ranks at different T must also compute the right thing.
    assert counted[label]["gradient_error"] < 3e-4
    return expected


def count_core(label: str, counted: dict[str, Any]) -> dict[str, int]:
    """Number of collectives of exactly the core's size, which must be the same in every case."""
    found = [case["core"] for case in counted[label]["cases"].values()]
    assert all(other == found[0] for other in found)
    return found[0]


def test_ddp_reduces_every_gradient_once_per_step(torch_engines: dict[str, Any]) -> None:
    """DDP also sends one number per parameter, which says if it was used."""
    sent = check_constant("ddp", torch_engines)
    assert sent["backward all-reduce"] == (2, torch_engines["model_bytes"] + 4 * torch_engines["parameters"])
    assert set(sent) == {"backward all-reduce", "update all-reduce"}


def test_fsdp_gathers_the_core_once_per_pass_and_reduces_it_once_per_step(torch_engines: dict[str, Any]) -> None:
    check_constant("fsdp", torch_engines)
    assert count_core("fsdp", torch_engines) == {
        "forward all-gather": ACCUMULATION,
        "backward all-gather": ACCUMULATION,
        "backward reduce-scatter": 1,
    }


def test_fsdp_without_resharding_gathers_once_for_forward_and_backward(torch_engines: dict[str, Any]) -> None:
    sent = check_constant("fsdp kept-gathered", torch_engines)
    assert "backward all-gather" not in sent
    assert count_core("fsdp kept-gathered", torch_engines) == {
        "forward all-gather": ACCUMULATION,
        "backward reduce-scatter": 1,
    }


def test_replicas_and_reductions_per_micro_batch_do_not_depend_on_the_depth(torch_engines: dict[str, Any]) -> None:
    sent = check_constant(REPLICAS, torch_engines)
    assert (
        sent["backward all-reduce"][1] == torch_engines["model_bytes"]
    )  # once per step, all of it, between the two replicas
    check_constant(EAGER, torch_engines)
    assert count_core(EAGER, torch_engines)["backward reduce-scatter"] == ACCUMULATION


def test_zero_1_and_2_gather_the_updated_weights_once_per_step(zero: dict[str, Any]) -> None:
    for label, reductions in (("zero1", 1), ("zero2", ACCUMULATION)):  # stage 2 keeps no unreduced gradient
        sent = check_constant(label, zero)
        assert sent["backward all-reduce"] == (reductions, reductions * zero["model_bytes"])
        assert sent["update all-gather"] == (2, zero["model_bytes"])  # one per parameter group
        assert "forward all-gather" not in sent


def test_zero_3_gathers_a_weight_once_or_twice_per_micro_batch(zero: dict[str, Any]) -> None:
    """Weights are fetched ahead in gathers of several units, and those whose next use comes soon are kept until then."""
    sent = check_constant("zero3", zero)
    gathered = sum(size for key, (_, size) in sent.items() if key.endswith("all-gather"))
    assert zero["model_bytes"] <= gathered / ACCUMULATION < 2 * zero["model_bytes"]
    # Stage 3 keeps no unreduced gradient: one reduction of all parameters per micro-batch, whatever T is.
    assert sent["backward reduce-scatter"] == (ACCUMULATION, ACCUMULATION * zero["model_bytes"])


def test_the_counter_sees_a_wrapping_that_pays_for_every_loop(
    torch_engines: dict[str, Any], zero: dict[str, Any]
) -> None:
    for counted, label in ((torch_engines, "fsdp layer-units"), (zero, "zero3 no-leaf-modules")):
        sent = [case["ranks"][0] for case in counted[label]["cases"].values()]
        gathers = [sum(n for key, (n, _) in case.items() if key.endswith("all-gather")) for case in sent]
        size = [sum(b for key, (_, b) in case.items() if key.endswith("all-gather")) for case in sent]
        print(f"{label}: all-gathers {gathers}, bytes {size} at T = 1, 4, 16")
        assert gathers == sorted(set(gathers))
        assert gathers[-1] > gathers[0] + 12 * ACCUMULATION
        assert size[-1] > 2 * size[0]
