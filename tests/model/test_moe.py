"""Experts and dense feed-forward parts against loops over tokens in float64; the counts and the balancing bias."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer, initialize, moe
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.feedforward import SquaredReLU, SwiGLU
from megatron_rdt.model.linear import linear
from megatron_rdt.model.moe import ExpertGradients, MixtureOfExperts, grouped_linear, rebalance

BASE = ModelConfig(
    vocab_size=37, dim=16, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, core_ffn="moe"
)
BASE = dataclasses.replace(BASE, experts=6, experts_per_token=2, expert_dim=10, shared_experts=2, shared_expert_dim=7)
SHAPES = [
    {},
    {"experts_per_token": 1, "shared_experts": 0},
    {"experts": 4, "experts_per_token": 4, "shared_experts": 1},
    {"experts": 1, "experts_per_token": 1},
]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module with random float64 weights; return it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def random_tensor(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ ((gate @ x) / (1 + torch.exp(-(gate @ x))) * (up @ x))


def token_by_token(moe: MixtureOfExperts, x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Compute the mixture of x (tokens, dim), one token and one expert at a time."""
    outputs = []
    for token in x:
        logits = moe.router @ token
        scores = torch.exp(logits) / torch.exp(logits).sum()
        chosen = sorted(range(config.experts), key=lambda i: -float(logits[i] + moe.selection_bias[i]))
        chosen = chosen[: config.experts_per_token]
        total = sum(scores[i] for i in chosen)
        y = sum(scores[i] / total * swiglu(token, moe.gate[i], moe.up[i], moe.down[i]) for i in chosen)
        width = config.shared_expert_dim or config.expert_dim
        for number in range(config.shared_experts):
            own = slice(number * width, (number + 1) * width)
            part = moe.shared
            y = y + swiglu(token, part.gate.weight[own], part.up.weight[own], part.down.weight[:, own])
        outputs.append(y)
    return torch.stack(outputs)


def check_equal(module: nn.Module, reference, x: torch.Tensor) -> None:
    """Compare values, and the gradients of the input and of every parameter."""
    cotangent, results = random_tensor(*x.shape, seed=2), []
    for function in (module, reference):
        inputs = x.clone().requires_grad_()
        module.zero_grad()
        y = function(inputs)
        (y * cotangent).sum().backward()
        assert function is reference or all(p.grad is not None for p in module.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
        results.append([y.detach(), inputs.grad, *gradients])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_equal_a_loop_over_tokens(shape: dict[str, int]) -> None:
    config = dataclasses.replace(BASE, **shape)
    moe = randomize(MixtureOfExperts(config))
    moe.selection_bias.copy_(2 * random_tensor(config.experts, seed=3))
    check_equal(moe, lambda x: token_by_token(moe, x.flatten(0, 1), config).view_as(x), random_tensor(3, 7, 16))


@pytest.mark.parametrize("favoured", [(0, 1), (5, 2), (3, 4)])
def test_no_token_is_dropped_when_all_go_to_the_same_experts(favoured: tuple[int, int]) -> None:
    moe = randomize(MixtureOfExperts(BASE))
    moe.selection_bias[list(favoured)] = 1000.0
    check_equal(moe, lambda x: token_by_token(moe, x.flatten(0, 1), BASE).view_as(x), random_tensor(2, 50, 16))
    idle = [i for i in range(6) if i not in favoured]
    assert moe.routing_sums[list(favoured)].tolist() == [100.0, 100.0]
    assert moe.routing_sums[idle].tolist() == [0.0] * 4
    scores = (random_tensor(2, 50, 16) @ moe.router.T).softmax(-1)
    torch.testing.assert_close(moe.routing_sums[-1], -(scores * scores.log()).sum())
    assert all(float(weights.grad[idle].abs().max()) == 0 for weights in (moe.gate, moe.up, moe.down))


def test_the_bias_changes_the_choice_and_no_weight() -> None:
    """With all experts chosen it changes nothing; with some, the chosen ones keep the proportions of their scores."""
    x = random_tensor(1, 40, 16)
    every = randomize(MixtureOfExperts(dataclasses.replace(BASE, experts_per_token=6)))
    before = every(x)
    every.selection_bias.copy_(3 * random_tensor(6, seed=3))
    torch.testing.assert_close(every(x), before, rtol=1e-12, atol=1e-12)

    one = randomize(MixtureOfExperts(dataclasses.replace(BASE, experts_per_token=1, shared_experts=0)))
    one.selection_bias[4] = 1000.0
    fourth = torch.stack([swiglu(token, one.gate[4], one.up[4], one.down[4]) for token in x[0]])
    torch.testing.assert_close(one(x)[0], fourth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_products_equal_the_pieces(dtype: torch.dtype, tolerance: float) -> None:
    """The grouped products that a GPU runs; PyTorch has them on the CPU too."""
    counts = [5, 0, 11, 1, 0, 7]
    ends = torch.tensor(counts).cumsum(0).int()
    weights = random_tensor(6, 24, 16).float()
    x, cotangent, results = random_tensor(24, 16).to(dtype), random_tensor(24, 24, seed=5).to(dtype), []
    for grouped in (True, False):
        rows, matrices = x.clone().requires_grad_(), weights.clone().requires_grad_()
        if grouped:
            y = grouped_linear(rows, matrices, ends)
        else:
            y = torch.cat([linear(piece, matrix) for piece, matrix in zip(rows.split(counts), matrices.unbind())])
        y.backward(cotangent)
        assert (y.dtype, rows.grad.dtype, matrices.grad.dtype) == (dtype, dtype, torch.float32)
        assert float(matrices.grad[[1, 4]].abs().max()) == 0
        results.append((y.detach().float(), rows.grad.float(), matrices.grad))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_idle_experts_have_no_gradient_where_the_product_leaves_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Blackwell the weight gradient of an expert without rows is whatever its memory held."""
    product = functional.grouped_mm

    def leave_garbage(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        result = product(a, b, offs=offs)
        idle = (offs.diff(prepend=offs.new_zeros(1)) == 0).nonzero()[:, 0]
        return result.index_fill(0, idle, math.nan) if a.dim() == b.dim() else result

    x, weights = random_tensor(24, 16).bfloat16(), random_tensor(6, 24, 16).float()
    ends = torch.tensor([5, 0, 11, 1, 0, 7]).cumsum(0).int()
    gradients = []
    for garbage in (False, True):
        if garbage:
            monkeypatch.setattr(functional, "grouped_mm", leave_garbage)
            monkeypatch.setattr(moe, "_writes_idle_groups", lambda device: False)
        matrices = weights.clone().requires_grad_()
        grouped_linear(x, matrices, ends).sum().backward()
        gradients.append(matrices.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_path_equals_the_sorted_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = randomize(MixtureOfExperts(dataclasses.replace(BASE, expert_dim=24))).float()
    x, results = random_tensor(3, 7, 16).to(dtype), []
    for _ in range(2):
        moe.zero_grad()
        inputs = x.clone().requires_grad_()
        y = moe(inputs)
        y.float().square().sum().backward()
        results.append([y.detach(), inputs.grad, *(p.grad.clone() for p in moe.parameters())])
        monkeypatch.setattr(moe, "_run_sorted_rows", lambda rows, ends: moe._run_experts_grouped(rows, ends.int()))
    for pieces, grouped in zip(*results):
        scale = float(pieces.abs().max())
        limit = (1e-5 if dtype == torch.float32 else 3e-2) * scale
        torch.testing.assert_close(grouped, pieces, rtol=0, atol=limit)


def model_of(**options: object) -> RecurrentDepthTransformer:
    return initialize(RecurrentDepthTransformer(dataclasses.replace(BASE, **options)), 3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", [DepthPlan((4, 4, 4)), DepthPlan((4, 1, 3)), DepthPlan((4, 2, 2), 1)])
def test_each_token_is_counted_once_per_iteration(checkpointing: bool, plan: DepthPlan) -> None:
    model = model_of()
    for layer in model.core.layers:
        nn.init.zeros_(layer.feedforward.router)  # indifferent
    set_checkpointing(model, "per_iteration" if checkpointing else "none")
    tokens = torch.randint(0, 37, (3, 5), generator=torch.Generator().manual_seed(0))
    model(tokens, plan).square().mean().backward()
    for layer in model.core.layers:
        assert float(layer.feedforward.routing_sums[:-1].sum()) == 2 * 5 * sum(plan.iterations)
    found = rebalance(model, 1e-3, lambda sums: sums)
    assert found["routing_entropy"] == pytest.approx(math.log(6), rel=1e-5)
    assert all(layer.feedforward.routing_sums is None for layer in model.core.layers)
    model.eval()
    model(tokens, plan).square().mean().backward()
    assert all(layer.feedforward.routing_sums is None for layer in model.core.layers)
    assert rebalance(model, 1e-3, lambda sums: sums)["expert_load_max"] == 0


def test_rebalance_moves_the_bias_by_the_sign_and_measures() -> None:
    model = model_of(core_layers=1)
    moe, other = model.core.layers[0].feedforward, torch.tensor([0.0, 8, 0, 0, 0, 0, 2.0], dtype=torch.float64)
    moe.routing_sums = torch.tensor([2.0, 6, 2, 0, 5, 1, 6.0], dtype=torch.float64)
    found = rebalance(model, 0.25, lambda sums: sums + other)  # another rank's: 2 14 2 0 5 1, mean 4
    assert moe.selection_bias.tolist() == [0.25, -0.25, 0.25, 0.25, -0.25, 0.25]
    assert found == {"expert_load_max": 14 / 4, "expert_idle": 1 / 6, "routing_entropy": 8.0 / 12}
    moe.routing_sums = torch.tensor([9.0, 0, 0, 0, 0, 0, math.nan], dtype=torch.float64)  # of a step that was discarded
    rebalance(model, 0.0, lambda sums: sums)
    assert moe.selection_bias.tolist() == [0.25, -0.25, 0.25, 0.25, -0.25, 0.25]
    assert moe.routing_sums is None
    assert rebalance(model_of(core_ffn="dense"), 0.1, lambda sums: sums) is None


def train_loads(rate: float) -> torch.Tensor:
    """Train a model whose router favours one expert; return each expert's load over the mean."""
    model = model_of(core_layers=1)
    moe = model.core.layers[0].feedforward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    moe.selection_bias[2] = 3.0  # the router's own preferences are small at the start
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = torch.randint(0, 37, (4, 17), generator=generator)
        losses = model(tokens[:, :-1], 2, targets=tokens[:, 1:])
        (losses["objective"] / 64).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums = moe.routing_sums
        rebalance(model, rate, lambda sums: sums)
    return sums[:-1] / sums[:-1].mean()


def test_balancing_evens_the_load() -> None:
    uneven, even = train_loads(0.0), train_loads(0.1)
    assert float(uneven[2]) == 3.0  # every token takes it: two of six experts
    assert float(even.max()) < 1.5
    assert float(even.min()) > 0.5


@pytest.mark.parametrize("kind", [SwiGLU, SquaredReLU])
def test_dense_parts_equal_their_formulas(kind: type[SwiGLU] | type[SquaredReLU]) -> None:
    part = randomize(kind(dataclasses.replace(BASE, ffn_dim=20)))

    def reference(x: torch.Tensor) -> torch.Tensor:
        if kind is SwiGLU:
            each = [swiglu(token, part.gate.weight, part.up.weight, part.down.weight) for token in x.flatten(0, 1)]
        else:
            hidden = [part.up.weight @ token for token in x.flatten(0, 1)]
            each = [part.down.weight @ torch.where(h > 0, h * h, torch.zeros_like(h)) for h in hidden]
        return torch.stack(each).view_as(x)

    check_equal(part, reference, random_tensor(3, 5, 16))


@pytest.mark.parametrize(("ffn", "width"), [("swiglu", 64), ("relu2", 64)])
def test_the_dense_width_follows_the_config(ffn: str, width: int) -> None:
    layer = RecurrentDepthTransformer(dataclasses.replace(BASE, ffn=ffn)).prelude[0].feedforward
    assert type(layer) is {"swiglu": SwiGLU, "relu2": SquaredReLU}[ffn]
    assert layer.up.weight.shape == (width, 16)


@pytest.mark.parametrize("waits", [False, True])
def test_gradients_of_experts_are_summed_over_passes(waits: bool) -> None:
    """At once or from the rows of all passes merged, also where experts are idle and passes differ in their rows."""
    weight = random_tensor(4, 24, 16)
    total, exact = ExpertGradients(weight.float(), waits), torch.zeros_like(weight)
    for seed, counts in enumerate([[5, 0, 11, 1], [0, 3, 2, 0], [2, 2, 0, 4]]):
        ends, rows = torch.tensor(counts).cumsum(0), sum(counts)
        grad, x = (random_tensor(rows, size, seed=seed).float() for size in (24, 16))
        total.add(grad, x, ends.int())
        for expert, (own_grad, own_x) in enumerate(zip(grad.split(counts), x.split(counts))):
            exact[expert] += own_grad.double().T @ own_x.double()
        assert len(total.pending) == (seed + 1 if waits else 0)
    torch.testing.assert_close(total.hand_over().double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        total.hand_over()


def test_experts_rounded_once_have_the_gradients_of_experts_rounded_at_each_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the grouped products that a GPU runs; where gradients wait for the end, they are rounded less often."""
    run_grouped = MixtureOfExperts._run_experts_grouped
    monkeypatch.setattr(MixtureOfExperts, "_run_sorted_rows", lambda self, x, ends: run_grouped(self, x, ends.int()))
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(BASE, expert_dim=24, shared_expert_dim=8)), 5)
    model.compute_dtype = torch.bfloat16
    tokens, results = torch.arange(24).view(3, 8), []
    for once, policy in ((False, "none"), (True, "per_iteration"), (True, "none")):
        model.core.rounds_once = once
        set_checkpointing(model, policy)
        model.zero_grad()
        model(tokens, DepthPlan((4, 2, 3), 3), targets=tokens)["objective"].backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    plain, recomputed, waiting = results
    for name, expected in plain.items():
        assert torch.equal(recomputed[name], expected), name
        torch.testing.assert_close(waiting[name], expected, rtol=0, atol=1e-2 * float(expected.abs().max()), msg=name)
