"""Classes that make the model a transformers model: config, forward with its output type, generation with its cache."""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.initialization import initial_parameter
from megatron_rdt.model.rdt import RecurrentDepthTransformer, make_depth_plan

# A cache is an argument and a field of the output of this name: `past_key_values` before transformers 5.24.
CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
# Arguments that transformers passes to every model and that this one ignores.
HARMLESS = ("return_dict", "cache_position", "num_items_in_batch", "logits_to_keep")


class RdtConfig(PreTrainedConfig):
    """Configuration of an export: the fields of ModelConfig as `model`, and the default number of iterations as `loops`."""

    model_type = "megatron_rdt"

    def __init__(self, model: dict[str, Any] | None = None, loops: int = 4, **kwargs: Any) -> None:
        self.model = model or dataclasses.asdict(ModelConfig())
        self.loops = loops
        self.vocab_size = self.model["vocab_size"]
        self.hidden_size = self.model["dim"]
        self.num_attention_heads = self.model["heads"]
        self.num_key_value_heads = self.model["kv_heads"]
        # transformers sizes caches by this: one slot per (iteration, layer).
        outer = self.model["prelude_layers"] + self.model["coda_layers"]
        self.num_hidden_layers = outer + loops * self.model["core_layers"]
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class SlotCache:
    """Adapter from a transformers cache to the interface of KVCache: its layers are the slots, one per (iteration, layer)."""

    budget = 0

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def make_room(self, slots: int) -> None:
        """Extend an empty cache sized for fewer loops to `slots`; ValueError if it is not a DynamicCache."""
        if self.cache.layer_class_to_replicate is not None:  # a cache without a fixed size
            return
        layers = len(self.cache.layers)
        missing = slots - layers
        if missing > 0 and not isinstance(self.cache, DynamicCache):
            raise ValueError(f"the cache has {layers} layers, this many loops need {slots}; pass a DynamicCache()")
        self.cache.layers.extend(DynamicLayer() for _ in range(missing))

    def update(self, slot: int, start: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Append to a slot and return all that it holds; `start` is ignored, since the cache counts its positions.

        A transformers cache stores pairs of tensors; the latents of mla are one tensor, so an empty one goes with it.
        """
        return self.cache.update(new[0], new[-1][..., :0] if len(new) == 1 else new[1], slot)[: len(new)]

    @property
    def slots(self) -> int:
        """Number of slots in use."""
        return sum(int(layer.get_seq_length()) > 0 for layer in self.cache.layers)

    @property
    def length(self) -> int:
        """Number of positions held."""
        return int(self.cache.get_seq_length())


class RdtForCausalLM(PreTrainedModel, GenerationMixin):
    """The recurrent-depth transformer as a transformers model; pass `loops` to forward or generate."""

    config_class = RdtConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer", "RecurrentCore"]  # noqa: RUF012
    _supports_sdpa = True
    accepts_loss_kwargs = False  # a mean, which transformers' Trainer divides by the accumulation steps

    def __init__(self, config: RdtConfig) -> None:
        super().__init__(config)
        self.model = RecurrentDepthTransformer(ModelConfig(**config.model))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as a run does, with seeds from torch's generator; parameters loaded from a file stay."""
        # transformers also passes modules that are not part of the model, such as a resized embedding.
        path = next((name for name, part in self.model.named_modules() if part is module), "embedding")
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                seed = int(torch.randint(1 << 62, (), device="cpu"))
                parameter.copy_(initial_parameter(self.model, f"{path}.{name}", parameter.shape, seed))

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output projection; None if it is tied to the embedding."""
        return self.model.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        loops: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, sequence, vocab), the extended cache and, given `labels`, the mean next-token loss.

        `position_ids` (batch or 1, sequence) default to counting the tokens that `attention_mask` admits. `cache` and
        `past_key_values` are the same: the former is its name from transformers 5.24 on.

        Raises:
            ValueError: `loops` is not a whole number of at least 1, or differs from that of the cache; or there are two
                caches.
            TypeError: an argument that would have no effect here.
        """
        unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in HARMLESS)
        if unknown:
            raise TypeError(f"this model's forward takes no {', '.join(unknown)}; the number of iterations is `loops`")
        if cache is not None and past_key_values is not None:
            raise ValueError("both cache and past_key_values are given; they are two names of one argument")
        cache = past_key_values if cache is None else cache
        batch, sequence = input_ids.shape
        plan = make_depth_plan(batch, loops=self.config.loops if loops is None else loops)
        if cache is None and use_cache:
            cache = DynamicCache()
        slots = None if cache is None else SlotCache(cache)
        start = 0 if slots is None else slots.length
        if slots is not None and start == 0:
            slots.make_room(self.model.cache_slots(plan.loops))  # generate() sized it for the default loops
        mask = positions = None
        if attention_mask is not None and not bool(attention_mask.all()):
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, start : start + sequence]
            keys = torch.arange(start + sequence, device=input_ids.device)
            queries = torch.arange(start, start + sequence, device=input_ids.device)[:, None]
            admitted = attention_mask.bool()[:, None, None, : start + sequence]
            # A padding query attends to itself, so that its softmax is defined; nothing reads its result.
            mask = ((keys <= queries) & admitted) | (keys == queries)
        if position_ids is not None:
            positions = position_ids[..., -sequence:]
        logits = self.model(input_ids, plan, cache=slots, start=start, positions=positions, mask=mask)
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].float().flatten(0, 1)
            loss = nn.functional.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
