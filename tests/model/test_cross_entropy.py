"""Chunked cross entropy equals torch's on full logits, values and gradients, and never holds the full logits."""

import itertools

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import cross_entropy as loss
from megatron_rdt.model.cross_entropy import cross_entropy, score_chunk, score_targets

TOKENS, DIM, VOCABULARY = (3, 7), 10, 29


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Return features, output matrix, targets, and weights with gradient."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(*TOKENS, DIM, generator=generator, dtype=dtype, requires_grad=True)
    matrix = torch.randn(VOCABULARY, DIM, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    return features, matrix, targets, torch.rand(*TOKENS, generator=generator, dtype=dtype, requires_grad=True)


def full_logits_loss(features, matrix, targets, weights, softcap, z_weight):
    """Compute the same three sums from full logits, with torch's own cross entropy."""
    logits = features @ matrix.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    each = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    square = logits.flatten(0, -2).exp().sum(-1).log().square()
    weights = 1.0 if weights is None else weights.flatten()
    return ((each + z_weight * square) * weights).sum(), (each * weights).sum(), (square * weights).sum()


# For 21 tokens: one chunk, chunks of 7 (they divide), of 4 (a shorter last one), of 1.
CHUNKS = [1 << 22, 7 * VOCABULARY, 4 * VOCABULARY + 3, 1]
OPTIONS = list(itertools.product(CHUNKS, (False, True), (0.0, 1.5), (0.0, 0.1)))


@pytest.mark.parametrize(("elements", "weighted", "softcap", "z_weight"), OPTIONS)
def test_values_and_gradients_equal_torchs(elements, weighted, softcap, z_weight, monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    features, matrix, targets, weights = inputs()
    leaves = [features, matrix, *([weights] if weighted else [])]
    given = weights if weighted else None
    sums = cross_entropy(features, matrix, targets, weights=given, softcap=softcap, z_weight=z_weight)
    expected = full_logits_loss(features, matrix, targets, given, softcap, z_weight)
    for ours, theirs in zip(sums, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert [value.requires_grad for value in sums] == [True, False, False]
    # The sum is part of a larger objective, whose factor only the backward pass knows.
    gradients = torch.autograd.grad(sums[0] ** 2 / 7, leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected[0] ** 2 / 7, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weighted", "softcap", "z_weight"), itertools.product((False, True), (0.0, 1.5), (0.0, 0.1)))
def test_chunks_scored_for_the_compiler_are_the_same(dtype, weighted, softcap, z_weight, monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    features, matrix, targets, weights = inputs()
    results = []
    for score in (None, score_chunk):
        x, w = (value.detach().clone().requires_grad_() for value in (features.to(dtype), matrix))
        given = weights.detach().clone().requires_grad_() if weighted else None
        options = {"weights": given, "softcap": softcap, "z_weight": z_weight, "score": score}
        sums = cross_entropy(x, w, targets, **options)
        sums[0].backward()
        results.append([*sums, x.grad, w.grad, *([given.grad] if given is not None else [])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fixed", range(3))
def test_inputs_without_gradient_get_none(fixed) -> None:
    leaves = list(inputs())
    del leaves[2]
    leaves[fixed] = leaves[fixed].detach()
    targets = inputs()[2]
    cross_entropy(leaves[0], leaves[1], targets, weights=leaves[2])[0].backward()
    expected = inputs()
    full_logits_loss(*expected, 0.0, 0.0)[0].backward()
    for index, (ours, theirs) in enumerate(zip(leaves, (expected[0], expected[1], expected[3]))):
        if index == fixed:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        assert not cross_entropy(*expected[:3])[0].requires_grad


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_bfloat16_features_stay_close(size, monkeypatch) -> None:
    """Sums and the matrix's gradient are float32; large logits, whose exponentials overflow, do no harm."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    features, matrix, targets, _ = inputs(torch.float32)
    scaled = (features * size).detach()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, w = scaled.to(dtype).requires_grad_(), matrix.detach().clone().requires_grad_()
        objective = cross_entropy(x, w if dtype != torch.float64 else w.double(), targets, z_weight=1e-4)[0]
        objective.backward()
        results.append((objective, x.grad, w.grad))
    assert [r.dtype for r in results[0]] == [torch.float32, torch.bfloat16, torch.float32]
    assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=0.02)
    for ours, exact in zip(results[0][1:], results[1][1:]):
        assert bool(ours.isfinite().all())
        assert functional.cosine_similarity(ours.double().flatten(), exact.double().flatten(), dim=0) > 0.995


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result of an operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("halting", ["none", "act", "gate"])
def test_full_logits_never_exist(halting, small, monkeypatch) -> None:
    """In forward and backward pass of a whole model. Without targets they exist, which shows that they would be seen."""
    model = small(halting=halting, vocab_size=301, logit_softcap=5.0)
    model.z_weight = 1e-3
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 16 * 301)
    tokens = torch.randint(0, 301, (4, 33), generator=torch.Generator().manual_seed(0))
    full, chunk, weights = 4 * 32 * 301, 16 * 301, max(p.numel() for p in model.parameters())
    with Largest() as chunked:
        model(tokens[:, :-1], DepthPlan((3,) * 4), targets=tokens[:, 1:])["objective"].backward()
    # States of all iterations of the gate, or the scores of attention, are the largest then.
    assert chunked.elements <= max(chunk, weights, 3 * 4 * 32 * 24, 4 * 4 * 32 * 32) < full / 2
    with Largest() as unchunked:
        functional.cross_entropy(model(tokens[:, :-1], 3).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert unchunked.elements >= full


@pytest.mark.parametrize("masked", [False, True])
def test_the_models_losses_equal_those_of_its_logits(masked, small) -> None:
    model = small(logit_softcap=3.0)
    model.z_weight = 0.01
    tokens = torch.randint(0, 37, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]]).bool() if masked else None
    losses = model(tokens[:, :-1], 3, targets=tokens[:, 1:], loss_mask=mask)
    logits, targets = model(tokens[:, :-1], 3).flatten(0, 1), tokens[:, 1:].flatten()
    if mask is not None:
        logits, targets = logits[mask.flatten()], targets[mask.flatten()]
    entropy = functional.cross_entropy(logits, targets, reduction="sum")
    objective = entropy + 0.01 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(losses["cross_entropy"], entropy.detach())
    torch.testing.assert_close(losses["objective"], objective)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(each, parameters, allow_unused=True) for each in (losses["objective"], objective)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)
    if mask is not None:
        nothing = model(tokens[:, :-1], 3, targets=tokens[:, 1:], loss_mask=torch.zeros_like(mask))
        assert float(nothing["objective"].detach()) == 0
        assert not any(
            g.any() for g in torch.autograd.grad(nothing["objective"], parameters, allow_unused=True) if g is not None
        )


class Halves:
    """One of two ranks that each hold half of the vocabulary; it knows what the other one would send."""

    def __init__(self, rank: int, features: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor) -> None:
        self.rank, self.sent = rank, []
        self.others: list[torch.Tensor] = []
        if rank == 0:
            other = Halves(1, features, matrix, targets)
            half = len(matrix) // 2
            score_targets(features, matrix[half:], targets, shards=other)
            self.others = other.sent

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.sent.append(x)
        return torch.stack((x, self.others[len(self.sent) - 1] if self.rank == 0 else x))


@pytest.mark.parametrize("elements", CHUNKS)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_scores_of_targets_equal_full_logits(elements, softcap, monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    features, matrix, targets, _ = inputs()
    logits = features @ matrix.T
    targets = torch.where(torch.arange(TOKENS[1]) % 2 == 0, logits.argmax(-1), targets)  # half of them are met
    losses, misses = score_targets(features, matrix, targets, softcap=softcap)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    each = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(TOKENS)
    torch.testing.assert_close(losses, each, rtol=1e-12, atol=1e-12)
    assert torch.equal(misses, logits.argmax(-1) != targets)
    assert 0 < misses.sum() < misses.numel()
    assert not losses.requires_grad


def test_scores_of_a_split_vocabulary_are_those_of_the_whole() -> None:
    features, matrix, targets, _ = inputs()
    matrix = matrix[:28]
    targets = torch.where(torch.arange(TOKENS[1]) % 2 == 0, (features @ matrix.T).argmax(-1), targets.clamp_max(27))
    expected = score_targets(features, matrix, targets)
    ours = score_targets(features, matrix[:14], targets, shards=Halves(0, features, matrix, targets))
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[1], expected[1])
    # Equal logits: the first id is the likeliest, whichever rank has it.
    zeros = torch.zeros_like(matrix)
    first = torch.zeros_like(targets)
    assert not score_targets(features, zeros[:14], first, shards=Halves(0, features, zeros, first))[1].any()
    last = first + 20
    assert score_targets(features, zeros[:14], last, shards=Halves(0, features, zeros, last))[1].all()


def test_logits_that_are_not_finite_are_misses() -> None:
    features, matrix, targets, _ = inputs()
    assert score_targets(features * float("nan"), matrix, torch.zeros_like(targets))[1].all()
