"""Folders of Huginn and Parcae with random weights, as these projects publish them."""

from pathlib import Path
from typing import Any

import torch

from megatron_rdt.data import Tokenizer
from tests.convert.imported import write_source
from tests.parity import test_parcae_and_huginn as parity

Weights = dict[str, torch.Tensor]


def small_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Return float32 weights large enough for every part to matter."""
    return parity.random_weights(shapes, torch.float32)


def with_vocabulary(shapes: dict[str, tuple[int, ...]], vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return shapes for another vocabulary than that of the plain references."""
    old = parity.BASE.vocab_size
    return {name: tuple(vocabulary if size == old else size for size in shape) for name, shape in shapes.items()}


HUGINN: dict[str, Any] = {
    **{"model_type": "huginn_raven", "block_class_name": "SandwichBlock", "mlp_class_name": "GatedMLP"},
    **{"nonlin_name": "SiLU", "bias": False, "injection_type": "linear", "state_init": "like-init"},
    **{"n_embd": parity.BASE.dim, "num_attention_heads": parity.BASE.heads, "intermediate_size": parity.BASE.ffn_dim},
    **{"n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 2, "norm_eps": 1e-6},
    **{"qk_bias": True, "tie_embeddings": True, "mean_recurrence": 4, "mean_backprop_depth": 2, "rope_base": 50000},
    # Of code that this folder does not have, and that must not be run:
    "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
}


def write_huginn(folder: Path, tokenizer: Path, shards: int = 1) -> Weights:
    """Write Huginn's folder as it is published; return the weights."""
    vocabulary = Tokenizer(tokenizer).vocab_size
    weights = small_weights(with_vocabulary(parity.huginn_shapes(), vocabulary))
    write_source(folder, HUGINN | {"vocab_size": vocabulary}, weights, tokenizer, shards)
    return weights


PARCAE: dict[str, Any] = {
    **{"_class_name": "ParcaeConfig", "model_class_name": "Parcae", "block_class_name": "TransformerPreNormBlock"},
    **{"mlp_class_name": "BaseMLP", "nonlin_name": "ReLU2", "norm_class_name": "RMSNorm", "injection_type": "diagonal"},
    **{"n_embd": parity.BASE.dim, "num_attention_heads": parity.BASE.heads, "intermediate_size": parity.BASE.ffn_dim},
    **{"num_key_value_heads": parity.BASE.heads, "recurrent_embedding_dimension": parity.BASE.dim},
    **{"recurrent_intermediation_embedding_dimension": parity.BASE.ffn_dim, "n_layers_in_prelude": 2},
    **{
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 2,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "prelude_norm": True,
    },
    **{"tie_embeddings": True, "init_strategy": "scaled-zero", "state_init": "like-init", "bias": False},
    **{"rope_settings": {"use_rope": True, "rope_base": 50000}, "mean_recurrence": 4, "mean_backprop_depth": 2},
    "recurrent_iteration_method": "per-sequence",
}
