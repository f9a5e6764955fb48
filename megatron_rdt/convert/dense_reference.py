"""Logits of a dense model by transformers' own class, one layer in memory at a time, to compare a conversion with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rdt.convert.sources.files import SourceWeights
from megatron_rdt.convert.streamed_logits import load_during_calls


class _SkippedLayer(nn.Module):
    """Returns its input; it takes the place of a layer that is dropped."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states."""
        return hidden_states


def build_dense_model(settings: Mapping[str, Any]) -> Any:
    """Return the model of a config.json by transformers' own class, on the meta device; None without transformers.

    The class is one of transformers itself, by the config's model_type: no code of the source is run.

    Raises:
        ValueError: transformers refuses the config.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    plain = {name: value for name, value in settings.items() if name not in ("auto_map", "quantization_config")}
    try:
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(plain)
        config.use_cache = False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        inner = model.model
        inner.rotary_emb = type(inner.rotary_emb)(config=config)  # its frequencies were made on the meta device
    except Exception as error:  # its checks raise nothing narrower that all its versions have
        raise ValueError(
            f"transformers refuses its config ({' '.join(str(error).split())}), and the result is compared with "
            "transformers' own model. Correct the config"
        ) from None
    return model


@torch.no_grad()
def compute_dense_logits(
    settings: Mapping[str, Any], weights: SourceWeights, kept: list[int], tokens: Tensor
) -> Tensor | None:
    """Return the logits of `tokens` (batch, sequence), float32; None where transformers is not installed.

    Args:
        settings: of its config.json, which transformers takes (`build_dense_model`).
        weights: its weights.
        kept: numbers of the layers that are run; the others are skipped.
        tokens: ids.
    """
    model = build_dense_model(settings)
    if model is None:
        return None
    inner = model.model
    parts = [("model.embed_tokens", inner.embed_tokens), ("lm_head", model.lm_head)]
    for index, layer in enumerate(inner.layers):
        if index in kept:
            parts.append((f"model.layers.{index}", layer))
        else:
            inner.layers[index] = _SkippedLayer()

    def read(name: str) -> Tensor:
        tied = name == "lm_head.weight" and bool(settings.get("tie_word_embeddings"))
        return weights.read("model.embed_tokens.weight" if tied else name).float()

    load_during_calls(model, parts, read)
    return model.eval()(input_ids=tokens, use_cache=False).logits
