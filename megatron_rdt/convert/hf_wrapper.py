"""What transformers needs around the model: config, output type, generation with its cache."""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.rdt import RecurrentDepthTransformer


class RdtConfig(PreTrainedConfig):
    """`model` holds the fields of ModelConfig; `loops` is the default number of iterations."""

    model_type = "megatron_rdt"

    def __init__(self, model: dict[str, Any] | None = None, loops: int = 4, **kwargs: Any) -> None:
        self.model = model or dataclasses.asdict(ModelConfig())
        self.loops = loops
        self.vocab_size = self.model["vocab_size"]
        self.hidden_size = self.model["dim"]
        self.num_attention_heads = self.model["heads"]
        self.num_key_value_heads = self.model["kv_heads"]
        # transformers sizes caches by this: one slot per (iteration, layer).
        self.num_hidden_layers = (
            self.model["prelude_layers"] + loops * self.model["core_layers"] + self.model["coda_layers"]
        )
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class RdtForCausalLM(PreTrainedModel, GenerationMixin):
    """The recurrent-depth transformer as a transformers model; pass `loops` to forward or generate."""

    config_class = RdtConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer", "RecurrentCore"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: RdtConfig) -> None:
        super().__init__(config)
        self.model = RecurrentDepthTransformer(ModelConfig(**config.model))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight comes from the checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, where it is not tied."""
        return self.model.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        loops: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, sequence, vocab); with `labels`, the loss of predicting each next token."""
        sequence = input_ids.shape[1]
        loops = loops or self.config.loops
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is None:
            past_key_values = DynamicCache() if use_cache else None
        elif start == 0 and len(past_key_values.layers) < self.model.cache_slots(loops):
            # generate() sized it for the default number of loops; a fresh one grows with the slots.
            past_key_values = DynamicCache()
        mask = positions = None
        if attention_mask is not None and not bool(attention_mask.all()):
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, start : start + sequence]
            keys = torch.arange(start + sequence, device=input_ids.device)
            causal = keys <= torch.arange(start, start + sequence, device=input_ids.device)[:, None]
            seen = attention_mask.bool()[:, None, None, : start + sequence]
            # A padding query sees itself, so that its softmax is defined; nothing reads its result.
            itself = keys == torch.arange(start, start + sequence, device=input_ids.device)[:, None]
            mask = (causal & seen) | itself
        logits = self.model(input_ids, loops, cache=past_key_values, start=start, positions=positions, mask=mask)
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].float().flatten(0, 1)
            loss = nn.functional.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
