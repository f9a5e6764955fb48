"""Every policy of `depth.checkpoint` computes the gradients of `none`, and keeps the memory that it says and no more."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rdt.config import ModelConfig, RunConfig, check_config, load_config
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer, initialize
from megatron_rdt.model.activation_checkpointing import Checkpointing, set_checkpointing

pytestmark = pytest.mark.slow

POLICIES: tuple[int | str, ...] = ("per_iteration", "per_layer", "selective", 1, 3, 50)
EXPERTS = {"core_ffn": "moe", "experts": 4, "experts_per_token": 2, "expert_dim": 16}
ALL_PARTS = {"signals": ["lora", "adaln"], "injection": "hyper", "norm_placement": "sandwich", "core_norm": "iteration"}
CASES: dict[str, tuple[dict[str, Any], DepthPlan]] = {
    "full": ({}, DepthPlan((7, 7), None, (7, 8))),
    "last 4": ({"state_init": "learned"}, DepthPlan((7, 7), 4)),
    "mixed": (ALL_PARTS, DepthPlan((7, 1, 5, 5), None)),
    "mixed, last 3": ({"value_embeddings": "gated", "attention": "gqa", "window": 3}, DepthPlan((7, 1, 5, 5), 3)),
    "latent attention": ({"attention": "mla"}, DepthPlan((5, 5), 3)),
    "experts": (EXPERTS, DepthPlan((2, 6, 6), 4)),
    "act": ({"halting": "act"}, DepthPlan((2, 6, 6), None)),
    "gate": ({"halting": "gate"}, DepthPlan((6, 6), None)),
}


def run(model: RecurrentDepthTransformer, plan: DepthPlan) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """Return the objective, every gradient, and the monitor's readings of every iteration."""
    tokens = torch.randint(0, 37, (len(plan.iterations), 10), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    monitor = CoreMonitor(per_iteration=True)
    loss = model(tokens[:, :-1], plan, targets=tokens[:, 1:], monitor=monitor)["objective"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, monitor.readings()["iterations"]  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float64", "bfloat16"])
def test_gradients_are_those_without_checkpoints(case: str, dtype: torch.dtype | None, small: Callable) -> None:
    options, plan = CASES[case]
    model = small(**options)
    if dtype is not None:
        model, model.compute_dtype = model.float(), dtype
    loss, gradients, iterations = run(model, plan)
    assert len(gradients) == len(dict(model.named_parameters()))
    for policy in POLICIES:
        set_checkpointing(model, policy)
        again, found, seen = run(model, plan)
        assert again == loss, policy
        # The iterations of one segment add up their gradients of the encoded input first: another order of rounding.
        regrouped = isinstance(policy, int) and policy > 1
        tolerance = 0.0 if not regrouped else 1e-12 if dtype is None else 1e-2
        for name, gradient in gradients.items():
            atol = tolerance * float(gradient.abs().max())
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=f"{policy}: {name}")
        assert dtype is not None or seen == iterations, policy


def test_segments_end_where_the_sequences_or_the_gradient_change() -> None:
    plan = DepthPlan((7, 7, 2), 4)
    for policy, sizes in (("none", [1] * 7), ("per_iteration", [1] * 7), (2, [2, 1, 2, 2]), (4, [3, 2, 2])):
        segments = list(Checkpointing(policy).segments(plan.core_iterations()))
        assert [len(iterations) for iterations in segments] == sizes, policy
        assert [iteration for iterations in segments for iteration in iterations] == list(plan.core_iterations())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within the context that are still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


BATCH, LENGTH, DIM = 2, 32, 64
STATE = 4 * BATCH * LENGTH * DIM  # bytes


@pytest.fixture(scope="module")
def model() -> RecurrentDepthTransformer:
    config = ModelConfig(vocab_size=64, dim=DIM, prelude_layers=1, core_layers=2, coda_layers=1, ffn_dim=128)
    return initialize(RecurrentDepthTransformer(config), 1)


def measure_bytes(model: RecurrentDepthTransformer, policy: int | str, loops: int, k: int | None) -> tuple[int, int]:
    """Return the live bytes between forward and backward pass, and their maximum over both."""
    set_checkpointing(model, policy)
    tokens = torch.randint(0, 64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # made outside
    with LiveBytes() as live:
        loss = model(tokens[:, :-1], DepthPlan((loops,) * BATCH, k), targets=tokens[:, 1:])["objective"]
        kept = live.now
        loss.backward()
    return kept, live.most


@pytest.mark.parametrize("policy", ["none", *POLICIES[:-1]])
def test_memory_does_not_grow_with_iterations_without_gradient(policy: int | str, model) -> None:
    """T = 64 with k = 4 takes at most a tenth more than T = 8 with k = 4."""
    few, many = (measure_bytes(model, policy, loops, 4) for loops in (8, 64))
    assert many[1] <= 1.1 * few[1]
    assert many[0] <= 1.1 * few[0]
    assert measure_bytes(model, policy, 64, None)[0] > many[0] + 15 * STATE, "it can grow"


def test_each_iteration_costs_what_its_policy_keeps(model: RecurrentDepthTransformer) -> None:
    """Memory per iteration in states, (batch, sequence, dim) of float32, with gradient through all iterations."""
    grown = {}
    for policy in ("none", *POLICIES):
        (kept, most), (kept_more, most_more) = (measure_bytes(model, policy, loops, None) for loops in (8, 32))
        grown[policy] = (kept_more - kept) / 24 / STATE, (most_more - most) / 24 / STATE
    assert grown["per_iteration"][0] == pytest.approx(1, abs=0.1)
    assert grown["per_iteration"][1] == pytest.approx(1, abs=0.1)
    assert grown[1] == pytest.approx(grown["per_iteration"])
    assert grown[3][0] < 0.6 * grown["per_iteration"][0]
    assert 2 <= grown["per_layer"][0] <= 6, "the input of each of two layers, and of the injection around them"
    assert grown["per_layer"][0] < grown["selective"][0] < 0.7 * grown["none"][0]


def test_an_impossible_policy_is_refused(tmp_path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    for word, value in (("4", 4), ("none", "none"), ("per_layer", "per_layer"), ("selective", "selective")):
        config: RunConfig = load_config(path, [f"--depth.checkpoint={word}"])
        assert config.depth.checkpoint == value
        check_config(config)
    with pytest.raises(ConfigError, match=r"depth\.checkpoint is 0, a number of iterations must be at least 1"):
        check_config(load_config(path, ["--depth.checkpoint=0"]))
    with pytest.raises(ConfigError, match=r"depth\.checkpoint"):
        load_config(path, ["--depth.checkpoint=sometimes"])
