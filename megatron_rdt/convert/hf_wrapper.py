"""Classes that make the model a transformers model: with a head, as AutoModelForCausalLM, and without, as AutoModel."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.hf_cache import LoopCache, SlotCache
from megatron_rdt.convert.hf_config import GENERATING, LOOP_OPTIONS, LoopSettings, RdtConfig
from megatron_rdt.convert.hf_inputs import read_positions_and_mask
from megatron_rdt.model.activation_checkpointing import Checkpointing
from megatron_rdt.model.forward_arguments import LogitsToKeep, make_depth_plan
from megatron_rdt.model.initial_noise import whole_block
from megatron_rdt.model.initialization import fill_initial_values
from megatron_rdt.model.linear import Linear
from megatron_rdt.model.rdt import Embedding, RecurrentDepthTransformer

# A cache is an argument and a field of the output of this name: `past_key_values` before transformers 5.24.
CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
# Arguments that `generate` passes on to every model and that say nothing to this one.
HARMLESS = ("cache_position", "tokenizer", "assistant_tokenizer")
# Other forms of the documents that positions begin where they restart; collators of packed rows pass them beside those.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def use_plain_modules(model: nn.Module) -> None:
    """Make the model's linear maps and its embedding exactly `nn.Linear` and `nn.Embedding`, in place.

    Some tools look for the class itself. What ours add serves training alone: float32 weights under another compute dtype,
    and vocabularies that ranks share.
    """
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif type(module) is Embedding:
            module.__class__ = nn.Embedding  # type: ignore[assignment]


def next_token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Return the mean cross entropy of each next label, (batch, sequence); those of -100 do not count.

    With `num_items_in_batch` the sum is divided by that instead: the mean over the micro-batches of a step.
    """
    shifted, targets = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].to(logits.device).flatten()
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(shifted, targets, ignore_index=-100)
    total = nn.functional.cross_entropy(shifted, targets, ignore_index=-100, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


class RdtPreTrainedModel(PreTrainedModel):
    """The recurrent-depth transformer in transformers' terms: base of the models with and without a head.

    Args:
        config: of the export.
        has_head: False leaves the output matrix out.
        model: to be used instead of a new one, with the initialization of whoever made it.
    """

    config_class = RdtConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer", "RecurrentCore"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: RdtConfig, has_head: bool, model: RecurrentDepthTransformer | None = None) -> None:
        super().__init__(config)
        if model is not None:
            self.model = model
            return
        # The head is a module of its own also where its weight is the embedding's: transformers ties the two.
        sizes = dataclasses.replace(ModelConfig(**config.model), tie_embeddings=not has_head)
        self.model = RecurrentDepthTransformer(sizes)
        use_plain_modules(self.model)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as a run does, with seeds from torch's generator; parameters loaded from a file stay."""
        # transformers also passes modules that are not part of the model, such as a resized embedding.
        path = next((name for name, part in self.model.named_modules() if part is module), "embedding")
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                seed = int(torch.randint(1 << 62, (), device="cpu"))
                fill_initial_values(self.model, f"{path}.{name}", parameter.shape, [whole_block(parameter)], seed)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embedding = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Do as every transformers model; ValueError for one whose layers have tables of the vocabulary too."""
        if self.config.model["value_embeddings"] != "none":
            raise ValueError("this model's value embeddings have a row per token, which resizing does not reach")
        return super().resize_token_embeddings(*args, **kwargs)

    @property
    def gradient_checkpointing(self) -> bool:
        """True if only the state after each iteration and the input of each other layer are kept for the backward pass."""
        return self.model.core.checkpointing.policy != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        """Set it; transformers does so by `gradient_checkpointing_enable`."""
        self.model.core.checkpointing = Checkpointing("per_iteration" if enable else "none")
        for layer in (*self.model.prelude, *self.model.coda):
            layer.checkpointed = enable

    def _run(
        self,
        logits_to_keep: LogitsToKeep,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the model's result, and cache and hidden states as fields of an output; the arguments are `forward`'s."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if position_ids is not None:
            options = {name: value for name, value in options.items() if name not in PACKING}
        settings = self._read_options(options)
        if inputs_embeds is not None:
            if self.config.model["value_embeddings"] != "none":
                raise ValueError("this model's layers look tokens up by their id: give input_ids, not inputs_embeds")
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
        assert input_ids is not None
        batch, sequence = input_ids.shape
        plan = make_depth_plan(batch, loops=settings.loops)
        if cache is None and use_cache:
            cache = LoopCache(settings.cache_budget) if needs_loop_cache(settings) else DynamicCache()
        slots = open_cache(cache, settings)
        start = 0 if slots is None else slots.length
        if isinstance(slots, SlotCache):
            if start == 0:
                slots.make_room(self.model.cache_slots(plan.loops))
            slots.check_length(start + sequence)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None
        result = self.model(
            input_ids,
            plan,
            cache=slots,
            start=start,
            embedded=inputs_embeds,
            logits_to_keep=logits_to_keep,
            states=states,
            exit_rule=settings.rule,
            **read_positions_and_mask(attention_mask, position_ids, start, batch, sequence),
        )
        return result, {CACHE: cache, "hidden_states": None if states is None else tuple(states)}

    def _read_options(self, options: dict[str, Any]) -> LoopSettings:
        """Return the settings of a forward pass from what `forward` got beyond its named arguments.

        Raises:
            TypeError: an argument that would have no effect here.
            ValueError: the settings do not fit together, or are not for training.
        """
        if options.pop("output_attentions", None) or getattr(self.config, "output_attentions", False):
            raise ValueError("this model returns no attentions: its kernels never have the probabilities as a tensor")
        given = {name: options.pop(name) for name in LOOP_OPTIONS if name in options}
        unknown = sorted(k for k, v in options.items() if v is not None and v is not False and k not in HARMLESS)
        if unknown:
            raise TypeError(
                f"this model's forward takes no {', '.join(unknown)}; its own options are {', '.join(LOOP_OPTIONS)}"
            )
        settings = (GENERATING.get() or self.config.loop_settings).override(given).check()
        if self.model.training and settings.exit != "fixed":
            raise ValueError('exit rules are for inference: model.eval(), or model.config.exit = "fixed" to train')
        return settings


def needs_loop_cache(settings: LoopSettings) -> bool:
    """Return True if the settings need a cache whose slots can be copied and shared."""
    return settings.exit != "fixed" or settings.cache_budget > 0


def open_cache(cache: Any, settings: LoopSettings) -> Any:
    """Return the model's interface to a transformers cache, None for None; ValueError if it does not fit the settings."""
    if isinstance(cache, LoopCache):
        if cache.held.budget != settings.cache_budget:
            raise ValueError(f"the cache has the budget {cache.held.budget}, this call {settings.cache_budget}")
        return cache.held
    if cache is not None and needs_loop_cache(settings):
        raise ValueError("an exit rule or a cache_budget needs a LoopCache; pass no cache, and one is made")
    return None if cache is None else SlotCache(cache)


def choose_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the one of two arguments that is given: one argument under its two names."""
    if cache is not None and past_key_values is not None:
        raise ValueError("both cache and past_key_values are given; they are two names of one argument")
    return past_key_values if cache is None else cache


class RdtModel(RdtPreTrainedModel):
    """The recurrent-depth transformer without its output matrix; pass `loops` to forward."""

    _keys_to_ignore_on_load_unexpected = [r"model\.head\.weight"]  # noqa: RUF012

    def __init__(self, config: RdtConfig, model: RecurrentDepthTransformer | None = None) -> None:
        super().__init__(config, has_head=False, model=model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Return the output of the final norm as `last_hidden_state`; for the arguments see `RdtForCausalLM.forward`."""
        cache = choose_cache(cache, past_key_values)
        inputs = input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_hidden_states
        features, fields = self._run(None, *inputs, kwargs)
        output = BaseModelOutputWithPast(last_hidden_state=features, **fields)
        return output.to_tuple() if return_dict is False else output


class RdtForCausalLM(RdtPreTrainedModel, GenerationMixin):
    """The recurrent-depth transformer as a transformers model; pass `loops` to forward or generate."""

    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: RdtConfig) -> None:
        super().__init__(config, has_head=True)
        # The same model without its head, for tools that apply the head themselves; not a submodule, since all weights
        # have their names already.
        self.__dict__["_backbone"] = RdtModel(config, self.model)

    @property
    def base_model(self) -> nn.Module:
        """The model up to its output matrix, with the same modules."""
        return self.__dict__.get("_backbone", self)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output projection."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        self.model.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (batch, kept positions, vocab), the extended cache and, given `labels`, the next-token loss.

        Arguments mean what they mean for every transformers model. `cache` and `past_key_values` are the same: the former
        is its name from transformers 5.24 on. Further ones are `loops` and the other `LoopSettings`, by default those of
        the `generate` that is running, else of the config. For masks and positions see `read_positions_and_mask`. Hidden
        states are those of the embedding, each prelude layer, each iteration, each coda layer, the final norm.

        Raises:
            ValueError: a setting is out of range or does not fit the cache, or something is asked for that there is not.
            TypeError: an argument that would have no effect here.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all positions; omit logits_to_keep")
        cache = choose_cache(cache, past_key_values)
        inputs = input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_hidden_states
        logits, fields = self._run(logits_to_keep, *inputs, kwargs)
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **fields)
        return output.to_tuple() if return_dict is False else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as every transformers model does, with the `LoopSettings` given here, in a GenerationConfig or the config.

        Raises:
            ValueError: a setting would be ignored, such as a budget without a cache.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if isinstance(prompt, Tensor) and prompt.numel() == 0 and kwargs.get("inputs_embeds") is None:
            raise ValueError(f"the prompt has shape {tuple(prompt.shape)}: there are no tokens. Give at least one")
        own = {name: kwargs.pop(name) for name in LOOP_OPTIONS if name in kwargs}
        settings = self.config.loop_settings
        for level in (self.generation_config, given):
            settings = settings.override({} if level is None else vars(level))
        settings = settings.override(own).check()
        configs = [config for config in (given, self.generation_config) if config is not None]
        if needs_loop_cache(settings) and CACHE not in kwargs and "past_key_values" not in kwargs:
            implementation = _first_given("cache_implementation", kwargs, configs)
            if implementation is not None:
                raise ValueError(
                    f"cache_implementation={implementation!r} does not go together with an exit rule or a cache_budget"
                )
            if _first_given("use_cache", kwargs, configs) is not False:
                kwargs[CACHE] = LoopCache(settings.cache_budget)
            elif settings.cache_budget:
                raise ValueError(f"cache_budget is {settings.cache_budget}, it has no meaning without a cache")
        with _generating(settings):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _first_given(name: str, arguments: dict[str, Any], configs: list[Any]) -> Any:
    """Return an argument of `generate`, else the first that is set in one of its configs, else None."""
    values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


@contextmanager
def _generating(settings: LoopSettings) -> Iterator[None]:
    """Let the forward passes and the caches in this block follow the settings."""
    token = GENERATING.set(settings)
    try:
        yield
    finally:
        GENERATING.reset(token)
