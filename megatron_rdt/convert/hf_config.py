"""The config of an export in transformers' terms, and the settings of the loop: from it, a GenerationConfig or a call."""

import dataclasses
from collections.abc import Mapping
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

from transformers import PretrainedConfig

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.halting.exit_rules import ExitRule, check_rule_can_act, read_exit_options


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """T, exit rule and cache budget of a call; the names are those of the options of `rdt generate`.

    Attributes:
        loops: T.
        exit, exit_threshold, exit_entropy, exit_hits, exit_min_loops, exit_in_order: see `ExitRule`.
        cache_budget: iterations with keys and values of their own; 0 means all.
    """

    loops: int = 4
    exit: str = "fixed"
    exit_threshold: float | None = None
    exit_entropy: float | None = None
    exit_hits: int = 1
    exit_min_loops: int = 1
    exit_in_order: bool = False
    cache_budget: int = 0

    @property
    def rule(self) -> ExitRule | None:
        """The exit rule, None without one; ValueError if the options do not fit together."""
        names = ("threshold", "entropy", "hits", "min_loops", "in_order")
        return read_exit_options(self.exit, **{name: getattr(self, f"exit_{name}") for name in names})

    def check(self) -> "LoopSettings":
        """Return the settings; ValueError if one is no number of its kind, out of range, or would have no effect."""
        for name, smallest in {"loops": 1, "cache_budget": 0, "exit_hits": 1, "exit_min_loops": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < smallest:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least {smallest}")
        for name in ("exit_threshold", "exit_entropy"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"{name} is {value!r}; give a number")
        if not isinstance(self.exit, str):
            raise ValueError(f"exit is {self.exit!r}; give the name of an exit rule")
        if not isinstance(self.exit_in_order, bool):
            raise ValueError(f"exit_in_order is {self.exit_in_order!r}; give True or False")
        if self.rule is not None:
            check_rule_can_act(self.rule, int(self.loops))
        return self

    def override(self, options: Mapping[str, Any]) -> "LoopSettings":
        """Return the settings with some replaced; another `exit` drops the options of the one before."""
        given = {name: options[name] for name in LOOP_OPTIONS if options.get(name) is not None}
        kept = self
        if given.get("exit", self.exit) != self.exit:
            kept = LoopSettings(loops=self.loops, cache_budget=self.cache_budget)
        return dataclasses.replace(kept, **given)


LOOP_OPTIONS = tuple(field.name for field in dataclasses.fields(LoopSettings))
# Settings of the `generate` that is running: its forward passes and the size of its cache follow them. Not an attribute
# of the model, which several threads may use.
GENERATING: ContextVar[LoopSettings | None] = ContextVar("GENERATING", default=None)


class RdtConfig(PretrainedConfig):
    """Configuration of an export: the fields of ModelConfig as `model`, and those of LoopSettings as defaults of calls."""

    model_type = "megatron_rdt"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = model or dataclasses.asdict(ModelConfig())
        for name, default in dataclasses.asdict(LoopSettings()).items():
            setattr(self, name, kwargs.pop(name, default))
        self.loop_settings.check()
        self.hidden_size = self.model["dim"]
        self.num_attention_heads = self.model["heads"]
        # Of a cache's tensors: the latents of mla are stored as two halves.
        latent = self.model["kv_rank"] + self.model["rope_dim"]
        is_latent = self.model["attention"] == "mla"
        self.num_key_value_heads = 1 if is_latent else self.model["kv_heads"]
        width = self.model["attention_dim"] or self.model["dim"]
        self.head_dim = -(-latent // 2) if is_latent else width // self.model["heads"]
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"):
            kwargs.pop(name, None)  # a saved config repeats them
        kwargs.setdefault("tie_word_embeddings", self.model["tie_embeddings"])
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """Set it in the model's fields, as a resized vocabulary does."""
        self.model = {**self.model, "vocab_size": size}

    @property
    def final_logit_softcapping(self) -> float | None:
        """Bound of the logits, under the name by which tools that apply the head themselves look for it."""
        return self.model["logit_softcap"] or None

    @property
    def num_hidden_layers(self) -> int:
        """Layers that a cache has slots for, by which transformers sizes it: one per (iteration, layer) at the T in use."""
        settings = GENERATING.get()
        loops = self.loops if settings is None else settings.loops
        return self.model["prelude_layers"] + self.model["coda_layers"] + loops * self.model["core_layers"]

    @property
    def loop_settings(self) -> LoopSettings:
        """The settings of a call that gives none."""
        return LoopSettings(**{name: getattr(self, name) for name in LOOP_OPTIONS})
