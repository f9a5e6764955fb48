"""Adapter for Huginn in benchmarks/peers.py: builds, trains and samples the authors' own model.

Only recpre/raven_modeling_minimal.py of seal-rg/recurrent-pretraining is imported, since its package imports the whole
training stack. Under transformers 5 it needs a dictionary of tied weights, and its cached generation fails
(`cache_position` is gone), so the loop over tokens is here and the forward passes, with its HuginnDynamicCache, are theirs.
"""

import importlib
import math
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from peer_models.base import Peer, Sizes, Work, split_by_gradient

FILE = Path("recpre") / "raven_modeling_minimal.py"


class Huginn(Peer):
    """Sandwich norms, linear injection, biased queries and keys, the last norm used twice."""

    name = "Huginn"
    install = "git clone https://github.com/seal-rg/recurrent-pretraining, and put it on PYTHONPATH"

    def config(self, sizes: Sizes) -> ModelConfig:
        """Return a config with the parts of configs/models/huginn_3_5b.yaml at these sizes."""
        return sizes.config(
            qk_bias=True,
            rope_base=50000.0,
            rope_pairing="adjacent",
            norm_placement="sandwich",
            core_norm="last_shared",
            encoded_norm=False,
            injection="linear",
            state_init="normal",
            state_std=math.sqrt(2 / 5),
            scale_embedding=True,
        )

    def build(self, sizes: Sizes) -> nn.Module:
        """Build the peer's model, with a stand-in package in sys.modules; ImportError if its file is missing."""
        root = next((Path(entry or ".") for entry in sys.path if (Path(entry or ".") / FILE).is_file()), None)
        if root is None:
            raise ImportError(f"{FILE} is not on PYTHONPATH")
        # A stand-in for the package, so that its __init__, which imports the training stack, does not run.
        package = types.ModuleType("recpre")
        package.__path__ = [str(root / "recpre")]
        sys.modules["recpre"] = package
        self.modeling = importlib.import_module("recpre.raven_modeling_minimal")
        self.modeling.RavenPreTrainedModel._tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
        config = self.modeling.RavenConfig(
            n_embd=sizes.dim,
            n_heads=sizes.heads,
            n_layers=2 * sizes.outer_layers + sizes.core_layers,
            block_size=2 * sizes.positions,
            vocab_size=sizes.vocabulary,
            intermediate_size=sizes.inner,
            n_layers_in_prelude=sizes.outer_layers,
            n_layers_in_recurrent_block=sizes.core_layers,
            n_layers_in_coda=sizes.outer_layers,
        )
        return self.modeling.RavenForCausalLM(config).float().train()

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor, work: Work, loops: tuple[int, ...]) -> Tensor:
        """Mean cross entropy by the peer's own forward pass; T and k are those of `work`, `loops` is unused."""
        model.gradient_checkpointing = work.checkpoint
        return model(tokens, labels=targets, num_steps=split_by_gradient(work)).loss

    def generate(self, model: nn.Module, prompt: Tensor, loops: int, new_tokens: int) -> Tensor:
        """Continue the prompt, sampled token by token at temperature 1 with the peer's cache."""
        cache = self.modeling.HuginnDynamicCache()
        tokens = new = prompt
        for _ in range(new_tokens):
            positions = torch.arange(tokens.shape[1] - new.shape[1], tokens.shape[1])
            steps = torch.tensor([loops, 0])
            output = model(new, num_steps=steps, cache_position=positions, past_key_values=cache, use_cache=True)
            new = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens
