"""Adapter for OpenMythos (open-mythos 0.5.0) in benchmarks/peers.py: its core is one layer of experts."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.iteration_signals import FEATURES, INDEX_CHANNELS_SHARE
from peer_models.base import Peer, Sizes, Work

EXPERTS, CHOSEN, EXPERT_DIM, SHARED, KV_HEADS, RANK, MAX_LOOPS = 8, 2, 256, 1, 2, 8, 16


class RunAll(nn.Module):
    """Replacement of the halting unit, with which an untrained model stops after two or three iterations: none stops early."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.last, self.calls = loops, 0

    def forward(self, h: Tensor) -> Tensor:
        """Halting probabilities (batch, sequence): 1 in the last iteration of each pass, 0 before."""
        self.calls += 1
        return torch.full(h.shape[:2], float(self.calls % self.last == 0), dtype=h.dtype, device=h.device)


class OpenMythos(Peer):
    """Decay around the layers, loop index, adapter per iteration, grouped-query attention, experts."""

    name = "OpenMythos"
    install = "pip install --no-deps open-mythos==0.5.0"
    lacks = ("backprop", "checkpoint", "per_sequence")

    def config(self, sizes: Sizes) -> ModelConfig:
        """Return a config like configs/models/openmythos_1b.yaml's, with grouped-query attention, no halting."""
        return sizes.config(
            core_layers=1,
            kv_heads=KV_HEADS,
            rope_base=500000.0,
            rope_pairing="adjacent",
            ffn_dim=sizes.dim * 4 // 3,
            core_ffn="moe",
            experts=EXPERTS,
            experts_per_token=CHOSEN,
            expert_dim=EXPERT_DIM,
            shared_experts=SHARED,
            shared_expert_dim=EXPERT_DIM * CHOSEN,
            encoded_norm=False,
            injection="residual",
            state_init="encoded",
            signals=["sinusoidal", "lora"],
            signal_rank=RANK,
        )

    def build(self, sizes: Sizes) -> nn.Module:
        """The peer's module, with `RunAll` as its halting unit."""
        package: Any = importlib.import_module("open_mythos")
        config = package.MythosConfig(
            vocab_size=sizes.vocabulary,
            dim=sizes.dim,
            n_heads=sizes.heads,
            n_kv_heads=KV_HEADS,
            max_seq_len=2 * sizes.positions,
            max_loop_iters=MAX_LOOPS,
            prelude_layers=sizes.outer_layers,
            coda_layers=sizes.outer_layers,
            attn_type="gqa",
            n_experts=EXPERTS,
            n_shared_experts=SHARED,
            n_experts_per_tok=CHOSEN,
            expert_dim=EXPERT_DIM,
            lora_rank=RANK,
        )
        model = package.OpenMythos(config).train()
        model.recurrent.act = RunAll(1)
        return model

    def count_extra_parameters(self, sizes: Sizes) -> int:
        """Count this project's extras: adapter scales as a function of t, the loop index's size, a step per channel."""
        adapter = FEATURES * RANK + RANK - MAX_LOOPS * RANK
        return adapter + sizes.dim // INDEX_CHANNELS_SHARE + sizes.dim - 1

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor, work: Work, loops: tuple[int, ...]) -> Tensor:
        """Mean cross entropy of the full logits; T is that of `work`, `loops` is unused; resets the `RunAll`."""
        model.recurrent.act = RunAll(work.loops)
        return functional.cross_entropy(model(tokens, n_loops=work.loops).flatten(0, 1), targets.flatten())

    def generate(self, model: nn.Module, prompt: Tensor, loops: int, new_tokens: int) -> Tensor:
        """Continue the prompt by the peer's own generation; `RunAll` keeps it from halting early."""
        model.recurrent.act = RunAll(loops)
        return model.generate(prompt, max_new_tokens=new_tokens, n_loops=loops, top_k=0)
