"""Adapter for Parcae in benchmarks/peers.py: the authors' SandyResearch/parcae, with receval to generate."""

import importlib
import math

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from peer_models.base import Peer, Sizes, Work, split_by_gradient


class Parcae(Peer):
    """Diagonal injection, squared ReLU, value embeddings, T per sequence under masks."""

    name = "Parcae"
    install = (
        "git clone https://github.com/SandyResearch/parcae, and put it on PYTHONPATH (the wheel parcae-lm is empty)"
    )
    lacks = ()

    def config(self, sizes: Sizes) -> ModelConfig:
        """Return a config with the parts of configs/models/parcae_140m.yaml at these sizes."""
        return sizes.config(
            qk_norm="plain",
            rope_base=50000.0,
            rope_pairing="adjacent",
            value_embeddings="gated",
            ffn="relu2",
            norm_eps=1e-5,
            input_matrix=True,
            output_matrix=True,
            state_init="normal",
            state_std=math.sqrt(2 / (5 * sizes.dim)),
        )

    def build(self, sizes: Sizes) -> nn.Module:
        """The peer's ModelingParcae, which adds generation to Parcae."""
        settings = importlib.import_module("parcae_lm.models.parcae.config")
        modeling = importlib.import_module("receval.models.parcae")
        config = settings.ParcaeConfig(
            block_size=2 * sizes.positions,
            vocab_size=sizes.vocabulary,
            padded_vocab_size=sizes.vocabulary,
            n_embd=sizes.dim,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.inner,
            recurrent_embedding_dimension=sizes.dim,
            recurrent_intermediation_embedding_dimension=sizes.inner,
            tie_embeddings=True,
            norm_class_name="RMSNorm",
            norm_eps=1e-5,
            nonlin_name="ReLU2",
            qk_norm=True,
            prelude_norm=True,
            init_strategy="scaled-zero",
            init_orthogonal=True,
            n_layers_in_prelude=sizes.outer_layers,
            n_layers_in_recurrent_block=sizes.core_layers,
            n_layers_in_coda=sizes.outer_layers,
            mean_recurrence=8,
            mean_backprop_depth=4,
            recurrent_iteration_method="per-sequence",
            activation_checkpoint_impl="per-iteration",
        )
        return modeling.ModelingParcae(config).train()

    def count_extra_parameters(self, sizes: Sizes) -> int:
        """Count this project's extras: one input gain per channel, where Parcae uses the step."""
        return sizes.dim

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor, work: Work, loops: tuple[int, ...]) -> Tensor:
        """Mean cross entropy by the peer's loss; `loops` replaces its draws of T if `work.per_sequence`."""
        model.gradient_checkpointing = work.checkpoint
        if not work.per_sequence:
            return model(tokens, labels=targets, num_steps_pair=split_by_gradient(work))["loss"]
        total = torch.tensor(loops)
        with_gradient = total.clamp(max=work.backprop)
        model._sample_batch_depths = lambda batch, length=None: (total - with_gradient, with_gradient)
        return model(tokens, labels=targets)["loss"]

    def generate(self, model: nn.Module, prompt: Tensor, loops: int, new_tokens: int) -> Tensor:
        """Continue the prompt by the peer's own generation at T = `loops`."""
        return model.generate(prompt, max_new_tokens=new_tokens, num_steps=loops)
