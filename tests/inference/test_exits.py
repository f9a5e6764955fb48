"""Exit rules: cached equals uncached, thresholds at their ends, and tokens that stopped are not computed."""

import dataclasses
import math

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.inference import ExitRule, ExitTrace, KVCache
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.halting.exit_rules import CRITERIA, ActMixture

CONFIG = ModelConfig(vocab_size=61, dim=32, heads=4, kv_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=12)
MLA = {"attention": "mla"}
INJECTIONS = [{"injection": name} for name in ("residual", "linear", "add", "gate", "hyper")]
PARTS = [
    {"state_init": "normal", "norm_placement": "sandwich", "core_norm": "last_shared"},
    {"state_init": "learned", "norm_placement": "peri", "core_norm": "iteration", "window": 5},
    {"signals": ["sinusoidal", "lora", "adaln"], "value_embeddings": "gated"},
    {"core_ffn": "moe", "output_matrix": True, "input_matrix": True, "core_norm": "last"},
    {"coda_layers": 0, "prelude_layers": 0},
    {"positions": "none", "window": 5},
    {**MLA, "positions": "none"},
]


def make_model(seed: int = 1, **changes: object) -> RecurrentDepthTransformer:
    """Model in float64, with weights that make tokens differ in how fast their state settles."""
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(CONFIG, **changes)), seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if model.core.halting is not None:
            model.core.halting.weight.normal_(0, 0.5, generator=generator)
            model.core.halting.bias.fill_(-1.0)
    return model


def some_tokens(rows: int = 3, length: int = 14) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(0))


def halting_of(kind: str) -> dict[str, object]:
    return {"halting": kind} if kind in ("act", "gate") else {}


def middle_rule(model: RecurrentDepthTransformer, kind: str) -> ExitRule:
    """Return a rule of this kind by which tokens of one text stop at different iterations of 8."""
    spread: dict[ExitRule, int] = {}
    for threshold in (
        (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if kind in ("act", "gate") else (0.1, 0.2, 0.4, 0.8, 1.1, 1.6)
    ):
        rule = ExitRule(kind, threshold, entropy=3.5 if kind == "kl_entropy" else math.inf)
        trace = ExitTrace()
        model(some_tokens(), 8, exit_rule=rule, trace=trace)
        assert trace.iterations is not None
        spread[rule] = len(trace.iterations.unique())
        if spread[rule] > 2:
            break
    best = max(spread, key=lambda rule: spread[rule])
    assert spread[best] > 1, spread
    return best


def run_in_chunks(
    model: RecurrentDepthTransformer, tokens: torch.Tensor, loops: int, rule: ExitRule, **more: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model on chunks of the tokens with a cache, some of one token; return logits and iterations."""
    cache, start, logits, used = KVCache(), 0, [], []
    for chunk in (4, 1, 1, 5, 1, tokens.shape[1] - 12):
        trace, part = ExitTrace(), tokens[:, start : start + chunk]
        logits.append(model(part, loops, cache=cache, start=start, exit_rule=rule, trace=trace, **more))
        used.append(trace.iterations)
        start += chunk
    assert cache.slots == model.cache_slots(loops, rule=rule)
    return torch.cat(logits, 1), torch.cat(used, 1)


@pytest.mark.parametrize("kind", list(CRITERIA))
@pytest.mark.parametrize("changes", [{}, MLA, {**MLA, "window": 4}, *INJECTIONS, *PARTS], ids=str)
@torch.no_grad()
def test_cached_equals_uncached(changes: dict, kind: str) -> None:
    model, tokens = make_model(**changes, **halting_of(kind)), some_tokens()
    rule, trace = middle_rule(model, kind), ExitTrace()
    for loops in (1, 2, 3, 8):
        whole = model(tokens, loops, exit_rule=rule, trace=trace)
        parts, used = run_in_chunks(model, tokens, loops, rule)
        assert torch.equal(used, trace.iterations)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, MLA, {"injection": "hyper", "window": 4}], ids=str)
@pytest.mark.parametrize("kind", ["fixed", *CRITERIA])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(changes: dict, kind: str) -> None:
    model, tokens, padding = make_model(**changes, **halting_of(kind)), some_tokens(), torch.tensor([0, 5, 2])
    rule = ExitRule() if kind == "fixed" else middle_rule(model, kind)
    together, used = run_in_chunks(model, tokens, 8, rule, padding=padding)
    for row, pad in enumerate(padding.tolist()):
        trace = ExitTrace()
        alone = model(tokens[row : row + 1, pad:], 8, exit_rule=rule, trace=trace)
        torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=1e-9, atol=1e-9)
        assert torch.equal(used[row : row + 1, pad:], trace.iterations)
        assert not used[row, :pad].any()


@pytest.mark.parametrize("kind", list(CRITERIA))
@torch.no_grad()
def test_thresholds_at_their_ends(kind: str) -> None:
    model, tokens = make_model(**halting_of(kind)), some_tokens()
    halting = kind in ("act", "gate")
    never, trace = ExitRule(kind, {"act": 1.0, "gate": math.inf}.get(kind, 0.0)), ExitTrace()
    if kind == "act":  # a sum of 1 is never reached within 4 iterations, nor is the trained 0.99
        model.core.halting.weight.zero_()
        model.core.halting.bias.fill_(-4.0)
    logits = model(tokens, 4, exit_rule=never, trace=trace)
    torch.testing.assert_close(logits, model(tokens, 4), rtol=1e-10, atol=1e-10)
    assert (trace.iterations == 4).all()
    # Stop at once, which is after the second iteration for a rule that compares two states or predictions.
    always, first = ExitRule(kind, 0.0 if halting else math.inf), 1 if halting or kind == "change" else 2
    logits = model(tokens, 4, exit_rule=always, trace=trace)
    torch.testing.assert_close(logits, model(tokens, first), rtol=1e-10, atol=1e-10)
    assert (trace.iterations == first).all()


@torch.no_grad()
def test_a_model_with_act_mixes_under_every_rule() -> None:
    model, tokens = make_model(halting="act"), some_tokens()
    logits = model(tokens, 5, exit_rule=ExitRule("change", 0.0))
    torch.testing.assert_close(logits, model(tokens, 5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", list(CRITERIA))
@torch.no_grad()
def test_rules_follow_their_formulas(kind: str) -> None:
    """A sequence of one token attends only to itself, so fixed-T runs give its state and prediction at every T."""
    model, loops = make_model(**halting_of(kind)), 8
    rule, tokens = middle_rule(model, kind), torch.arange(61)[:, None]
    states, logits = [torch.zeros(61, 32, dtype=torch.float64)], [torch.zeros(61, 61)]
    hook = model.core.register_forward_hook(lambda _m, _i, output: states.append(output[0][:, 0]))
    plain = make_model(halting="none")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "halting" not in k})
    plain.core.register_forward_hook(lambda _m, _i, output: states.append(output[0][:, 0]))
    hook.remove()
    for t in range(1, loops + 1):
        logits.append(plain(tokens, t)[:, 0].log_softmax(-1))
    h = torch.stack(states)
    step, size = (h[1:] - h[:-1]).norm(dim=-1), h[1:].norm(dim=-1)
    holds = torch.zeros(loops + 1, 61, dtype=torch.bool)
    if kind == "change":
        holds[1:] = step < rule.threshold * size
    elif kind == "second_difference":
        holds[2:] = (h[2:] - 2 * h[1:-1] + h[:-2]).norm(dim=-1) < rule.threshold * size[1:]
    elif kind in ("kl", "kl_entropy"):
        p = torch.stack(logits)
        kl, entropy = (p[2:].exp() * (p[2:] - p[1:-1])).sum(-1), -(p[2:].exp() * p[2:]).sum(-1)
        holds[2:] = (kl < rule.threshold) & (entropy < rule.entropy)
    else:
        probability = model.core.halting(h[1:])
        total = probability.cumsum(0) if kind == "act" else 1 - (1 - probability).cumprod(0)
        holds[1:] = total >= rule.threshold
    holds[loops] = True
    trace = ExitTrace()
    model(tokens, loops, exit_rule=rule, trace=trace)
    assert torch.equal(trace.iterations[:, 0], holds.int().argmax(0))
    assert len(trace.iterations.unique()) > 1


@torch.no_grad()
def test_hits_are_counted_in_a_row() -> None:
    model, tokens = make_model(), torch.arange(61)[:, None]
    traces = [ExitTrace() for _ in range(2)]
    for hits, trace in enumerate(traces, start=1):
        model(tokens, 12, exit_rule=ExitRule("change", 0.2, hits=hits), trace=trace)
    once, twice = (trace.iterations for trace in traces)
    assert (twice >= (once + 1).clamp_max(12)).all()
    assert (twice == once + 1).any()


@pytest.mark.parametrize("kind", ["change", "kl"])
@torch.no_grad()
def test_stopped_tokens_are_not_computed(kind: str) -> None:
    model, loops = make_model(), 8
    rule, seen = middle_rule(model, kind), {"core": 0, "coda": 0}
    for name, layer in (("core", model.core.layers[0]), ("coda", model.coda[0])):
        layer.register_forward_hook(
            lambda _m, inputs, _o, name=name: seen.__setitem__(name, seen[name] + inputs[0].shape[:2].numel())
        )
    trace = ExitTrace()
    tokens = some_tokens(rows=1, length=40)
    model(tokens, loops, exit_rule=rule, trace=trace)
    spent = int(trace.iterations.sum())
    assert seen["core"] == spent < loops * tokens.numel()
    assert seen["coda"] == (spent if kind == "kl" else tokens.numel())
    # Decoding: a row that has stopped leaves the batch.
    cache, batch = KVCache(), some_tokens(rows=8, length=6)
    model(batch[:, :5], loops, cache=cache, exit_rule=rule)
    seen["core"] = 0
    model(batch[:, 5:], loops, cache=cache, start=5, exit_rule=rule, trace=trace)
    assert seen["core"] == int(trace.iterations.sum()) < loops * len(batch)


@torch.no_grad()
def test_the_answer_of_act_is_the_weighted_state() -> None:
    model = make_model(halting="act")
    active = type("All", (), {"take": staticmethod(lambda x: x), "put": staticmethod(lambda _x, values: values)})()
    mixture = ActMixture(model.core.halting, 0.6)
    states = torch.randn(6, 2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(2, 3, dtype=torch.float64)
    weights = torch.zeros(6, 2, 3, dtype=torch.float64)
    for t, state in enumerate(states):
        answer, _ = mixture.update(active, state)
        p = model.core.halting(state)
        for position in [(i, j) for i in range(2) for j in range(3)]:
            if total[position] < 0.6:
                stopped = weights.clone()
                stopped[t][position] = 1 - total[position]
                expected = (stopped[:, *position, None] * states[:, *position]).sum(0)
                torch.testing.assert_close(answer[position], expected)
                ends = total[position] + p[position] >= 0.6
                weights[t][position] = 1 - total[position] if ends else p[position]
                total[position] = 1.0 if ends else total[position] + p[position]
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 3, dtype=torch.float64) * mixture.halted)


ORDERED = [{}, {**MLA, "window": 4}, {"injection": "hyper"}, {"prelude_layers": 0, "coda_layers": 0}]


@pytest.mark.parametrize("kind", ["change", "kl", "act"])
@pytest.mark.parametrize("changes", ORDERED, ids=str)
@torch.no_grad()
def test_tokens_stop_in_order_cached_as_uncached(changes: dict, kind: str) -> None:
    model, tokens = make_model(**changes, **halting_of(kind)), some_tokens()
    plain, free, trace = middle_rule(model, kind), ExitTrace(), ExitTrace()
    model(tokens, 8, exit_rule=plain, trace=free)
    for rule in (dataclasses.replace(plain, in_order=True), dataclasses.replace(plain, in_order=True, min_loops=3)):
        whole = model(tokens, 8, exit_rule=rule, trace=trace)
        used = trace.iterations
        assert (used[:, 1:] >= used[:, :-1]).all()
        assert (used >= rule.min_loops).all()
        parts, in_parts = run_in_chunks(model, tokens, 8, rule)
        assert torch.equal(in_parts, used)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    assert (free.iterations[:, 1:] < free.iterations[:, :-1]).any(), (
        "without it, some token stopped before an earlier one"
    )


@torch.no_grad()
def test_min_loops_is_a_minimum_and_nothing_else() -> None:
    model, tokens, trace = make_model(), some_tokens(), ExitTrace()
    model(tokens, 8, exit_rule=ExitRule("change", math.inf, min_loops=3), trace=trace)
    assert (trace.iterations == 3).all()
    model(tokens, 8, exit_rule=ExitRule("change", math.inf, min_loops=9), trace=trace)
    assert (trace.iterations == 8).all()


@torch.no_grad()
def test_order_is_that_of_each_document_and_of_each_row() -> None:
    """Documents packed into one row, and rows padded on the left, stop as each does alone."""
    model, tokens = make_model(), some_tokens(1, 15)
    rule = dataclasses.replace(middle_rule(model, "change"), in_order=True)
    together, alone = ExitTrace(), ExitTrace()
    documents = torch.tensor([[0] * 6 + [1] + [2] * 8])
    positions = torch.tensor([[*range(6), 0, *range(8)]])
    model(tokens, 8, exit_rule=rule, trace=together, documents=documents, positions=positions)
    for first, last in ((0, 6), (6, 7), (7, 15)):
        model(tokens[:, first:last], 8, exit_rule=rule, trace=alone)
        assert torch.equal(together.iterations[:, first:last], alone.iterations)
    rows, padding = some_tokens(), torch.tensor([0, 5, 2])
    _, used = run_in_chunks(model, rows, 8, rule, padding=padding)
    for row, pad in enumerate(padding.tolist()):
        model(rows[row : row + 1, pad:], 8, exit_rule=rule, trace=alone)
        assert torch.equal(used[row : row + 1, pad:], alone.iterations)


def make_wave() -> RecurrentDepthTransformer:
    """Model in which a signal at the first token moves on by one position per iteration.

    The state is (a constant, the signal), with a norm after each iteration. Attention takes the mean over a token and the one
    before it, and adds its signal; nothing else has an effect. So a token whose turn is yet to come does not change.
    """
    config = ModelConfig(
        vocab_size=2,
        **{"dim": 2, "heads": 1, "kv_heads": 1, "window": 2, "prelude_layers": 0, "core_layers": 1, "coda_layers": 0},
        **{"injection": "add", "core_norm": "iteration", "encoded_norm": False, "state_init": "embedding"},
        tie_embeddings=False,
    )
    model = initialize(RecurrentDepthTransformer(config), 0).double().eval()
    layer = model.core.layers[0]
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name.startswith("core."):
            parameter.data.zero_()
    layer.attention.value.weight.data.copy_(torch.diag(torch.tensor([0.0, 1.0])))
    layer.attention.output.weight.data.copy_(torch.diag(torch.tensor([0.0, 4.0])))
    model.embedding.weight.data.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    model.head.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    return model


@torch.no_grad()
def test_a_token_that_waits_for_its_neighbours_is_not_settled() -> None:
    model, tokens = make_wave(), torch.tensor([[1] + [0] * 7])
    trace = ExitTrace()
    fixed = model(tokens, 24)[:, -1].argmax(-1)
    assert int(fixed) == 1, "the signal arrives"
    for hits in (1, 2):
        early = model(tokens, 24, exit_rule=ExitRule("change", 0.01, hits=hits), trace=trace)[:, -1].argmax(-1)
        assert int(early) == 0, "the last token has stopped before it"
        assert int(trace.iterations[0, -1]) == hits + 1
    rule = ExitRule("change", 0.01, in_order=True)
    assert int(model(tokens, 24, exit_rule=rule, trace=trace)[:, -1].argmax(-1)) == 1
    assert 8 <= int(trace.iterations[0, -1]) < 24


@torch.no_grad()
def test_invalid_calls_are_refused() -> None:
    model, tokens = make_model(), some_tokens()
    for settings in ({"kind": "x"}, {"kind": "kl", "threshold": -1.0}, {"kind": "act", "threshold": 1.5}):
        with pytest.raises(ValueError, match="exit rule"):
            ExitRule(**settings)
    with pytest.raises(ValueError, match="hits 0"):
        ExitRule("change", 0.1, hits=0)
    with pytest.raises(ValueError, match="min_loops 0"):
        ExitRule("change", 0.1, min_loops=0)
    cache, rule = KVCache(), ExitRule("change", 0.1)
    model(tokens[:, :5], 4, cache=cache, exit_rule=rule)
    with pytest.raises(ValueError, match="filled without an exit rule whose tokens stop in order"):
        model(tokens[:, 5:], 4, cache=cache, start=5, exit_rule=dataclasses.replace(rule, in_order=True))
    for kind in ("act", "gate"):
        with pytest.raises(ValueError, match=f"model.halting: {kind}"):
            model(tokens, 4, exit_rule=ExitRule(kind, 0.5))
    with pytest.raises(ValueError, match="for inference"):
        model(tokens, 4, targets=tokens, exit_rule=ExitRule("change", 0.1))
    cache = KVCache()
    model(tokens[:, :5], 4, cache=cache, exit_rule=ExitRule("kl", 0.1))
    with pytest.raises(ValueError, match="filled at T = "):
        model(tokens[:, 5:], 4, cache=cache, start=5)
    with pytest.raises(ValueError, match="budget is -1"):
        KVCache(-1)
