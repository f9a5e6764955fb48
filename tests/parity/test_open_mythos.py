"""Parity with open-mythos 0.5.0 under converted weights: equal where it is self-consistent, correct where it is not.

`make test-parity` installs the package; it pins another torch, so it comes without its dependencies.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import load_config
from megatron_rdt.convert.peers import from_open_mythos
from megatron_rdt.inference import KVCache
from megatron_rdt.model import RecurrentDepthTransformer
from tests.parity.recorded import BASE, RECORD, compute_logits

open_mythos = pytest.importorskip("open_mythos", reason="open-mythos is not installed: make test-parity")

LOOPS = 8


def make_peer(attention: str) -> torch.nn.Module:
    """Return their module in float64, with random weights large enough for every part to matter."""
    torch.manual_seed(0)
    config = open_mythos.MythosConfig(
        vocab_size=BASE.vocab_size,
        dim=BASE.dim,
        n_heads=BASE.heads,
        n_kv_heads=BASE.kv_heads,
        max_seq_len=64,
        max_loop_iters=LOOPS,
        prelude_layers=BASE.prelude_layers,
        coda_layers=BASE.coda_layers,
        attn_type=attention,
        kv_lora_rank=BASE.kv_rank,
        q_lora_rank=BASE.query_rank,
        qk_rope_head_dim=BASE.rope_dim,
        qk_nope_head_dim=BASE.nope_dim,
        v_head_dim=BASE.value_dim,
        n_experts=BASE.experts,
        n_shared_experts=BASE.shared_experts,
        n_experts_per_tok=BASE.experts_per_token,
        expert_dim=BASE.expert_dim,
        lora_rank=BASE.signal_rank,
    )
    peer = open_mythos.OpenMythos(config).double().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(0.5 * scale * torch.randn_like(parameter))
        peer.recurrent.block.ffn.router_bias.normal_()
    return peer


def convert_peer(peer: torch.nn.Module, **changes: object) -> RecurrentDepthTransformer:
    """Return this project's model with their weights."""
    config = dataclasses.replace(BASE, attention=peer.cfg.attn_type, **changes)
    model = RecurrentDepthTransformer(config).double().eval()
    model.load_state_dict(from_open_mythos(peer.state_dict(), config))
    return model


def tokens(length: int = 11) -> torch.Tensor:
    return torch.randint(0, BASE.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


class StopAt(torch.nn.Module):
    """Stand-in for their halting unit: all probability falls on the last iteration."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.calls = last, 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full(h.shape[:2], float(self.calls == self.last), dtype=h.dtype)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("loops", range(1, LOOPS + 1))
@torch.no_grad()
def test_logits_are_equal_without_halting(attention: str, loops: int) -> None:
    """Attention, experts and their selection bias, loop index, adapter, decay: all but ACT, at every T."""
    peer = make_peer(attention)
    model = convert_peer(peer, halting="none")
    peer.recurrent.act = StopAt(loops)
    torch.testing.assert_close(model(tokens(), loops), peer(tokens(), n_loops=loops), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attention", "scale"), [("gqa", 0.2), ("mla", 0.5)])
@torch.no_grad()
def test_logits_are_equal_with_act_when_every_token_halts(attention: str, scale: float) -> None:
    peer = make_peer(attention)
    peer.recurrent.act.halt.weight.mul_(scale)
    peer.recurrent.act.halt.bias.fill_(-0.3)
    seen: list[torch.Tensor] = []
    peer.recurrent.act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    theirs = peer(tokens(), n_loops=LOOPS)
    reached = torch.stack(seen).cumsum(0)
    halts = (reached < 0.99).sum(0)
    assert int(halts.max()) < len(seen)  # within the budget
    assert len(halts.unique()) >= 3  # at different iterations
    torch.testing.assert_close(convert_peer(peer, halting="act")(tokens(), LOOPS), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loops", [1, 2, 4])
@torch.no_grad()
def test_act_weights_sum_to_one_here_when_the_budget_ends_first(loops: int) -> None:
    """Theirs drops the remaining probability, so the state's scale depends on T; here the last state gets it."""
    peer = make_peer("gqa")
    peer.recurrent.act.halt.weight.mul_(0.1)
    peer.recurrent.act.halt.bias.fill_(-2.0)
    model = convert_peer(peer, halting="act")
    probabilities: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    peer.recurrent.act.register_forward_hook(lambda module, inputs, output: probabilities.append(output))
    peer.recurrent.injection.register_forward_hook(lambda module, inputs, output: states.append(output))
    peer.recurrent.register_forward_hook(lambda module, inputs, output: mixed.append(output))
    model.core.register_forward_hook(lambda module, inputs, output: mixed.append(output[0]))
    peer(tokens(), n_loops=loops)
    model(tokens(), loops)
    theirs, here = mixed
    weights = torch.stack(probabilities)  # of the iterations; none has halted
    assert float(weights.sum(0).max()) < 0.9
    rest = (1 - weights.sum(0)).unsqueeze(-1)
    torch.testing.assert_close(theirs, (weights.unsqueeze(-1) * torch.stack(states)).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(here, theirs + rest * states[-1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_decay_of_one_is_refused_and_cannot_be_reached_here() -> None:
    """exp(-exp(x)) is exactly 1 in float32 for x <= -17.33: their state never decays and its gradient is 0."""
    peer = make_peer("gqa").float()
    peer.recurrent.injection.log_A.fill_(-18.0)
    peer.recurrent.injection.log_dt.fill_(0.0)
    assert float(peer.recurrent.injection.get_A().max()) == 1.0
    with pytest.raises(ValueError, match=r"32 of 32 channels decay by up to 1 per iteration"):
        convert_peer(peer)
    peer.recurrent.injection.log_A.fill_(0.0)
    model = convert_peer(peer).float()
    assert model.spectral_radius() == pytest.approx(float(peer.recurrent.injection.get_A().max()), rel=1e-6)
    for value in (-1e4, 1e4):
        for parameter in (model.core.injection.diagonal.rate, model.core.injection.diagonal.step):
            parameter.fill_(value)
        assert model.spectral_radius() < 1


@torch.no_grad()
def test_the_latent_cache_has_one_rotary_key_for_all_heads_here() -> None:
    """Per token and layer: kv_rank + rope_dim here, kv_rank + heads * rope_dim there; the logits stay the same."""
    loops, peer = 3, make_peer("mla")
    model = convert_peer(peer, halting="none")
    peer.recurrent.act = StopAt(loops)
    text = tokens()
    expected = peer(text, n_loops=loops)
    theirs: dict[str, dict[str, torch.Tensor]] = {}
    peer.recurrent.act = StopAt(loops)
    peer(text, n_loops=loops, kv_cache=theirs)
    kept = sum(value.numel() for layer in theirs.values() for value in layer.values()) // text.numel()
    cache = KVCache()
    steps = [model(text[:, i : i + 1], loops, cache=cache, start=i) for i in range(text.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-5, atol=1e-5)
    slots = BASE.prelude_layers + loops + BASE.coda_layers
    assert kept == slots * (BASE.kv_rank + BASE.heads * BASE.rope_dim)
    assert cache.elements // len(text) == slots * (BASE.kv_rank + BASE.rope_dim)


def test_the_recorded_logits_are_theirs() -> None:
    assert compute_logits() == json.loads(RECORD.read_text())


PRESETS = {
    "1b": 1_064_028_034,
    "3b": 3_041_725_186,
    "10b": 9_981_316_994,
    "50b": 50_374_247_426,
    "100b": 99_545_072_130,
    "500b": 497_849_137_154,
    "1t": 999_326_352_386,
}
FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "dim",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "prelude_layers": "prelude_layers",
    "coda_layers": "coda_layers",
    "attention": "attn_type",
    "kv_rank": "kv_lora_rank",
    "query_rank": "q_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim",
    "value_dim": "v_head_dim",
    "experts": "n_experts",
    "shared_experts": "n_shared_experts",
    "experts_per_token": "n_experts_per_tok",
    "expert_dim": "expert_dim",
    "halting_threshold": "act_threshold",
    "rope_base": "rope_theta",
    "signal_rank": "lora_rank",
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_their_dimensions_and_parameters(name: str, repository: Path) -> None:
    theirs = getattr(open_mythos, f"mythos_{name}")()
    here = load_config(repository / "configs" / "models" / f"openmythos_{name}.yaml")
    assert {f: getattr(here.model, f) for f in FIELDS} == {f: getattr(theirs, old) for f, old in FIELDS.items()}
    assert (here.depth.scheme, here.depth.mean) == ("fixed", theirs.max_loop_iters)
    with torch.device("meta"):
        peer = open_mythos.OpenMythos(theirs)
    assert sum(parameter.numel() for parameter in peer.parameters()) == PRESETS[name]


def test_other_weights_are_refused() -> None:
    peer = make_peer("gqa")
    config = dataclasses.replace(BASE, halting="act")
    state = peer.state_dict()
    with pytest.raises(ValueError, match=r"do not exist in the config's network: extra"):
        from_open_mythos({**state, "extra": state["norm.weight"]}, config)
    with pytest.raises(ValueError, match=r"the weights have no prelude\.0\.attn\.q_down"):
        from_open_mythos(state, dataclasses.replace(config, attention="mla"))
    with pytest.raises(ValueError, match=r"set model\.discretization to zoh"):
        from_open_mythos(state, dataclasses.replace(config, discretization="euler"))
