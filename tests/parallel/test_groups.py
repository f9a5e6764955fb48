"""Which parameters decay."""

import torch

from megatron_rdt.config import ModelConfig, OptimizerConfig
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.engine import adamw, parameter_groups

LAYERS = ("prelude.0", "core.layers.0", "coda.0")
MATRICES = {
    "embedding.weight",
    "head.weight",
    *(f"{layer}.attention.{name}.weight" for layer in LAYERS for name in ("query", "key", "value", "output")),
    *(f"{layer}.feedforward.{name}.weight" for layer in LAYERS for name in ("gate", "up", "down")),
}
VECTORS = {
    *(f"{layer}.{name}_norm.weight" for layer in LAYERS for name in ("attention", "feedforward")),
    *(f"core.injection.{name}" for name in ("rate", "step", "gain")),
    "core.encoded_norm.weight",
    "final_norm.weight",
}


def model() -> RecurrentDepthTransformer:
    return RecurrentDepthTransformer(
        ModelConfig(vocab_size=61, dim=32, prelude_layers=1, core_layers=1, coda_layers=1, tie_embeddings=False)
    )


def groups(network: RecurrentDepthTransformer) -> list[tuple[set[str], float]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = parameter_groups(network, OptimizerConfig(weight_decay=0.3))
    return [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in found]


def test_matrices_decay_and_vectors_do_not() -> None:
    network = model()
    assert groups(network) == [(MATRICES, 0.3), (VECTORS, 0.0)]
    assert [group["weight_decay"] for group in adamw(network, OptimizerConfig(weight_decay=0.3)).param_groups] == [
        0.3,
        0,
    ]


def test_the_shape_before_zero_sharded_it_decides() -> None:
    network = model()
    for parameter in network.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert groups(network) == [(MATRICES, 0.3), (VECTORS, 0.0)]
