"""The model as vLLM runs it: this project's layers around vLLM's attention, embedding and output matrix."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from megatron_rdt.config import ModelConfig
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.vllm_plugin.paged_forward import run_features
from megatron_rdt.vllm_plugin.support import check_supported
from megatron_rdt.vllm_plugin.weights import VOCABULARY, allocate_parts, local_part, model_name


def _is_compilable(vllm_config: VllmConfig) -> bool:
    """Return True if the loop is one graph; outside of grouped products, experts run on pieces of unknown sizes."""
    return vllm_config.model_config.hf_config.model["core_ffn"] != "moe"


@support_torch_compile(enable_if=_is_compilable)
class RdtBody(nn.Module):
    """The model up to its output matrix, which vLLM compiles as a whole with its T unrolled; attention stays an operator.

    Attributes:
        model: this process's part; its embedding and head are modules of vLLM.
        slots: vLLM's attention of each cache slot.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        settings = vllm_config.model_config.hf_config.loop_settings
        self.config = config = ModelConfig(**vllm_config.model_config.hf_config.model)
        self.loops, self.budget = settings.loops, settings.cache_budget
        parallel, processes = vllm_config.parallel_config, get_tensor_model_parallel_world_size()
        quantization = vllm_config.model_config.quantization
        check_supported(config, settings, processes, parallel.pipeline_parallel_size, quantization)
        dtype = vllm_config.model_config.dtype
        with torch.device("meta"):
            self.model = RecurrentDepthTransformer(config)
        del self.model.embedding, self.model.head
        # vLLM makes models under the device that they are for.
        allocate_parts(self.model, processes, dtype, torch.empty(0).device)
        self.model.compute_dtype = dtype
        self.model.embedding = VocabParallelEmbedding(config.vocab_size, config.dim)
        head = ParallelLMHead(config.vocab_size, config.dim)
        self.model.head = head.tie_weights(self.model.embedding) if config.tie_embeddings else head
        if processes > 1:
            for layer in (*self.model.prelude, *self.model.core.layers, *self.model.coda):
                for part in (layer.attention, layer.feedforward):
                    part.register_forward_hook(lambda module, args, output: tensor_model_parallel_all_reduce(output))
        # vLLM makes a cache for each of these, and takes its number from its name.
        self.slots = nn.ModuleList(
            Attention(
                config.heads // processes,
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=config.kv_heads // processes,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=config.window or None,
                prefix=f"{prefix}.slots.{slot}.attn",
            )
            for slot in range(self.model.cache_slots(self.loops, self.budget))
        )

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Return the input of the output matrix, (tokens, dim), for the tokens of all requests."""
        return run_features(self.model, input_ids, positions, self.loops, list(self.slots), self.budget, inputs_embeds)


class RdtForVllm(nn.Module):
    """An export in vLLM; T, fixed for the engine, and the cache budget are those of its config or of `hf_overrides`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.body = RdtBody(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "body"))
        config = self.body.config
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.logit_softcap or None)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the vectors (tokens, dim) of ids (tokens,)."""
        return self.body.model.embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the input of the output matrix, (tokens, dim), for the tokens of all requests."""
        if input_ids is None:
            if self.body.config.value_embeddings != "none":
                raise ConfigError("this model's layers look tokens up by their id: give token ids, not embeddings")
            input_ids = torch.zeros_like(positions)
        return self.body(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits (tokens, vocab_size) on the first process, and what vLLM's layer returns on the others."""
        return self.logits_processor(self.body.model.head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy this process's part of an export's weights; return the names of the parameters that have theirs."""
        rank, processes = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        model = self.body.model
        targets: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
        loaded = set()
        for exported, tensor in weights:
            name = model_name(exported)
            if name not in targets:
                raise CheckpointError(f"{exported} is no weight of a model with this config. Export it again.")
            if name in VOCABULARY:
                targets[name].weight_loader(targets[name], tensor)
            else:
                targets[name].copy_(local_part(name, tensor, rank, processes))
            loaded.add(f"body.model.{name}")
        return loaded
