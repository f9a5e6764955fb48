"""Ouro's logits by the equations of its paper (arXiv:2510.25741) and config, in plain float64 code."""

import math

import torch


def ouro_logits(
    w: dict[str, torch.Tensor], tokens: torch.Tensor, loops: int, *, layers: int, heads: int, kv_heads: int, base: float
) -> torch.Tensor:
    """All layers `loops` times over the embeddings; a norm ends each iteration, and the head reads the last one's output.

    A layer has norms before and after attention and feed-forward: x + n2(attention(n1(x))), x + n4(mlp(n3(x))).
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (x @ w[f"{name}.{part}_proj.weight"].T for part in "qkv")
        size, outputs = q.shape[-1] // heads, []
        for head in range(heads):
            own, shared = head, head // (heads // kv_heads)
            query, key = turn(q[..., own * size : (own + 1) * size]), turn(k[..., shared * size : (shared + 1) * size])
            scores = query @ key.transpose(-1, -2) / math.sqrt(size)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            outputs.append(weights @ v[..., shared * size : (shared + 1) * size])
        return torch.cat(outputs, -1) @ w[f"{name}.o_proj.weight"].T

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[-2])[:, None] * base ** -(torch.arange(half).double() / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    def feedforward(x: torch.Tensor, name: str) -> torch.Tensor:
        gate = x @ w[f"{name}.gate_proj.weight"].T
        return (gate * gate.sigmoid() * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T

    x = w["model.embed_tokens.weight"][tokens]
    for _ in range(loops):
        for name in (f"model.layers.{i}" for i in range(layers)):
            x = x + norm(
                attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn"), f"{name}.input_layernorm_2"
            )
            y = feedforward(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            x = x + norm(y, f"{name}.post_attention_layernorm_2")
        x = norm(x, "model.norm")
    return x @ w["lm_head.weight"].T
