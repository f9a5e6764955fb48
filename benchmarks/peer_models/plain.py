"""A plain looped transformer, as a competent user of PyTorch writes it in an afternoon, without code of this project."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_rdt.config import ModelConfig
from peer_models.base import Peer, Sizes, Work

EPS, ROPE_BASE = 1e-6, 10000.0


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) of the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Block(nn.Module):
    """A pre-norm layer with rotary attention and SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim, self.heads = sizes.dim, sizes.heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """(batch, sequence, dim) -> the same; `past` holds earlier keys and values and is extended."""
        batch, sequence, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, sequence, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            past[:] = [k, v]
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=sequence > 1)
        x = x + self.out(y.transpose(1, 2).reshape(batch, sequence, dim))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class PlainLoop(nn.Module):
    """Prelude, core T times on h + e from h = 0, coda."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.prelude = nn.ModuleList(Block(sizes) for _ in range(sizes.outer_layers))
        self.core = nn.ModuleList(Block(sizes) for _ in range(sizes.core_layers))
        self.coda = nn.ModuleList(Block(sizes) for _ in range(sizes.outer_layers))
        self.norm = nn.RMSNorm(sizes.dim, eps=EPS)
        channels = sizes.dim // sizes.heads
        angles = torch.arange(2 * sizes.positions)[:, None] * ROPE_BASE ** (-torch.arange(0, channels, 2) / channels)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(
        self,
        tokens: Tensor,
        loops: int,
        backprop: int | None = None,
        checkpointed: bool = False,
        cache: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """(batch, sequence) -> logits; `cache` has a list for each layer that runs, in order."""
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        rope: Any = tuple(table[start : start + tokens.shape[1]] for table in (self.cos, self.sin))
        layer_caches = iter(cache if cache is not None else [])

        def run(x: Tensor, blocks: nn.ModuleList) -> Tensor:
            for block in blocks:
                x = block(x, *rope, next(layer_caches, None))
            return x

        e = run(self.embed(tokens), self.prelude)
        h = torch.zeros_like(e)
        for t in range(loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (backprop is None or t >= loops - backprop)):
                if checkpointed:
                    h = checkpoint(lambda h, e: run(h + e, self.core), h, e, use_reentrant=False)
                else:
                    h = run(h + e, self.core)
        return functional.linear(self.norm(run(h, self.coda)), self.embed.weight)


class Plain(Peer):
    """The plain looped transformer as a peer."""

    name = "plain PyTorch"
    install = "nothing"

    def config(self, sizes: Sizes) -> ModelConfig:
        """Additive injection, an initial state of zeros, no other parts."""
        return sizes.config(injection="add", encoded_norm=False, state_init="zero", norm_eps=EPS, rope_base=ROPE_BASE)

    def build(self, sizes: Sizes) -> nn.Module:
        """A new `PlainLoop`."""
        return PlainLoop(sizes)

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor, work: Work, loops: tuple[int, ...]) -> Tensor:
        """Mean cross entropy of the full logits; T, k and checkpoints are those of `work`, `loops` is unused."""
        logits = model(tokens, work.loops, work.backprop, work.checkpoint)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, model: nn.Module, prompt: Tensor, loops: int, new_tokens: int) -> Tensor:
        """Continue the prompt, sampled at temperature 1, with a cache that grows by concatenation."""
        assert isinstance(model, PlainLoop)
        layers = len(model.prelude) + loops * len(model.core) + len(model.coda)
        cache: list[list[Tensor]] = [[] for _ in range(layers)]
        tokens = new = prompt
        for _ in range(new_tokens):
            logits = model(new, loops, cache=cache)[:, -1]
            new = torch.multinomial(logits.softmax(-1), 1)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens
