"""The formula for floating-point operations against what PyTorch counts operator by operator.

Three things are counted differently, all on purpose, and all are added up exactly here:

- a causal query sees (L + 1) / 2 keys on average; the counter takes attention's products in full, over L keys;
- the counter sees the forward passes that activation checkpointing repeats; the formula (for MFU) does not;
- the state before the first iteration with gradient needs none, so the backward pass of `linear` lacks one product there.

Attention runs as plain matrix products here, which the counter knows; fused kernels are the same mathematics.
"""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.flops import BACKWARD_FACTOR, attention_flops, forward_flops, mean_keys, training_flops

BATCH, LENGTH = 3, 24
MODELS = [
    ModelConfig(vocab_size=61, dim=32, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2),
    ModelConfig(vocab_size=61, dim=48, prelude_layers=2, core_layers=1, coda_layers=0, heads=4, kv_heads=4, ffn_dim=80),
    ModelConfig(vocab_size=61, dim=32, heads=8, kv_heads=1, tie_embeddings=False),
    ModelConfig(vocab_size=61, dim=32, attention="mla", query_rank=20, ffn="relu2", output_matrix=True),
    ModelConfig(vocab_size=61, dim=32, core_ffn="moe", experts=4, experts_per_token=2, injection="linear"),
    ModelConfig(vocab_size=61, dim=32, window=5, injection="gate", input_matrix=True),
]
NAMES = ["grouped", "deep prelude", "untied", "latent", "experts", "window"]
DEPTHS = [(1, None), (2, None), (6, None), (6, 1), (6, 4), (9, 3)]


def attention_in_full(config: ModelConfig) -> float:
    """Per token and layer: what the counter has more than the formula, two products over all L keys."""
    return attention_flops(config, LENGTH) * (LENGTH / mean_keys(config, LENGTH) - 1)


def count(config: ModelConfig, plan: DepthPlan, *, train: bool, checkpointing: bool = False, bf16: bool = False) -> int:
    model = initialize(RecurrentDepthTransformer(config), seed=0)
    set_checkpointing(model, "per_iteration" if checkpointing else "none")
    model.compute_dtype = torch.bfloat16 if bf16 else None
    tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        loss = functional.cross_entropy(model(tokens[:, :-1], plan).float().flatten(0, 1), tokens[:, 1:].flatten())
        if train:
            loss.backward()
    return counter.get_total_flops()


def layer_passes(config: ModelConfig, loops: int, loops_with_grad: int) -> int:
    """Passes through a layer, a backward pass as two."""
    once = config.prelude_layers + config.coda_layers
    return (1 + BACKWARD_FACTOR) * once + (loops + BACKWARD_FACTOR * loops_with_grad) * config.core_layers


@pytest.mark.parametrize("config", MODELS, ids=NAMES)
@pytest.mark.parametrize(("loops", "backprop"), DEPTHS)
def test_training(config: ModelConfig, loops: int, backprop: int | None) -> None:
    plan = DepthPlan((loops,) * BATCH, backprop)
    formula = training_flops(config, forward_flops(config, LENGTH), plan.loops, plan.max_loops_with_grad)
    causal = layer_passes(config, plan.loops, plan.max_loops_with_grad) * attention_in_full(config)
    lacking = 2 * config.dim**2 if config.injection == "linear" else 0
    assert count(config, plan, train=True) == pytest.approx((formula + causal - lacking) * BATCH * LENGTH, rel=1e-12)


@pytest.mark.parametrize("config", MODELS, ids=NAMES)
@pytest.mark.parametrize("loops", [1, 2, 7])
def test_forward(config: ModelConfig, loops: int) -> None:
    layers = config.prelude_layers + loops * config.core_layers + config.coda_layers
    parts = forward_flops(config, LENGTH)
    formula = parts.prelude + loops * parts.iteration + parts.around + parts.coda
    expected = formula + layers * attention_in_full(config)
    counted = count(config, DepthPlan((loops,) * BATCH), train=False)
    assert counted == pytest.approx(expected * BATCH * LENGTH, rel=1e-12)


@pytest.mark.parametrize("backprop", [None, 2])
def test_recomputation_is_not_counted_as_work(backprop: int | None) -> None:
    config, plan = MODELS[0], DepthPlan((5,) * BATCH, backprop)
    plain, checkpointed = (count(config, plan, train=True, checkpointing=on) for on in (False, True))
    # Recomputation stops at the last tensor that the backward pass needs, so the last product of each iteration,
    # the down projection of its last layer, is not repeated.
    iteration = forward_flops(config, LENGTH).iteration + config.core_layers * attention_in_full(config)
    iteration -= 2 * config.ffn_width * config.dim
    assert checkpointed - plain == plan.max_loops_with_grad * iteration * BATCH * LENGTH


def test_precision_does_not_change_the_count() -> None:
    plan = DepthPlan((4,) * BATCH, 2)
    assert count(MODELS[0], plan, train=True, bf16=True) == count(MODELS[0], plan, train=True)
