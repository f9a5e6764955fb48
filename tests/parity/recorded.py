"""Recorded logits of open-mythos 0.5.0, computed from weights that are a function of their names and need no file.

python -m tests.parity.recorded     # records again; needs the package (make test-parity installs it)
"""

import json
import zlib
from pathlib import Path

import torch

from megatron_rdt.config import ModelConfig

BASE = ModelConfig(
    vocab_size=61,
    dim=32,
    prelude_layers=2,
    core_layers=1,
    coda_layers=1,
    heads=4,
    kv_heads=2,
    kv_rank=12,
    query_rank=10,
    nope_dim=6,
    rope_dim=4,
    value_dim=5,
    rope_base=500000.0,
    rope_pairing="adjacent",
    ffn_dim=32 * 4 // 3,
    core_ffn="moe",
    experts=8,
    experts_per_token=2,
    expert_dim=12,
    shared_experts=2,
    shared_expert_dim=24,
    encoded_norm=False,
    injection="residual",
    state_init="encoded",
    signals=["sinusoidal", "lora"],
    signal_rank=3,
)
RECORD = Path(__file__).parent / "open_mythos_logits.json"
TOKENS = torch.tensor([[7, 60, 0, 7, 33, 12]])
# Attention, halting, T. Without halting any T will do; with ACT, one at which every token has stopped.
CASES = (("gqa", "none", 3), ("mla", "none", 3), ("gqa", "act", 8))


def make_weight(name: str, shape: list[int]) -> torch.Tensor:
    """Return a random weight, float64, seeded by its name's checksum and large enough for every part to matter."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    if name == "recurrent.act.halt.bias":
        return values.fill_(-0.3)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * values
    return values * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)


def make_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: make_weight(name, shape) for name, shape in shapes.items()}


@torch.no_grad()
def compute_logits() -> dict[str, dict[str, object]]:
    """Return, for each case, the shapes of the weights and the package's logits at the last position."""
    from tests.parity.test_open_mythos import StopAt, make_peer

    found: dict[str, dict[str, object]] = {}
    seen: list[torch.Tensor] = []
    for attention, halting, loops in CASES:
        peer = make_peer(attention)
        # Tied to the embedding, and tables of rotary positions.
        computed = {"head.weight", "freqs_cis", "freqs_cis_mla"}
        shapes = {name: list(value.shape) for name, value in peer.state_dict().items() if name not in computed}
        peer.load_state_dict(make_weights(shapes), strict=False)
        seen.clear()
        if halting == "none":
            peer.recurrent.act = StopAt(loops)
        else:
            peer.recurrent.act.register_forward_hook(lambda module, inputs, output: seen.append(output))
        logits = peer(TOKENS, n_loops=loops)[0, -1]
        assert not seen or float(torch.stack(seen).sum(0).min()) >= 0.99, "a token has not stopped"
        found[f"{attention} {halting} {loops}"] = {
            "shapes": shapes,
            "logits": [round(value, 8) for value in logits.tolist()],
        }
    return found


if __name__ == "__main__":
    RECORD.write_text(json.dumps(compute_logits(), separators=(",", ":")) + "\n")
