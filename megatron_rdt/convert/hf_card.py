"""The README.md of an export: a model card with what is known of the model, its training and its scores, and no more."""

import math
from collections.abc import Sequence

import megatron_rdt
from megatron_rdt.config import RunConfig
from megatron_rdt.convert.hf import ExportSource
from megatron_rdt.convert.hf_parity import CHECK_SCRIPT, PARITY_FILE
from megatron_rdt.convert.hf_tokenizer import HIDDEN_FOLDER
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE as SENTENCEPIECE_FILE
from megatron_rdt.depth import DepthSampler

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- recurrent-depth
- looped-transformer
- megatron_rdt
- custom_code
---
"""
WITH_TOKENIZER = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, loops=8)[0]))
```"""
ENCODE = 'encode("def ")'
WITHOUT_TOKENIZER = f"""The tokenizer is the SentencePiece model `{HIDDEN_FOLDER}/{SENTENCEPIECE_FILE}`.
Do not let transformers convert it: the ids may differ.

```python
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = SentencePieceProcessor(model_file=f"{{PATH}}/{HIDDEN_FOLDER}/{SENTENCEPIECE_FILE}")
inputs = torch.tensor([tokenizer.{ENCODE}])
print(tokenizer.decode(model.generate(inputs, max_new_tokens=50, loops=8)[0].tolist()))
```"""


def format_model_card(
    source: ExportSource, dtype: str, size: int, parity: str, left_out: str, results: Sequence[str]
) -> str:
    """Return the model card, Markdown.

    Args:
        source: the checkpoint.
        dtype: of the weights in the files.
        size: bytes of these files.
        parity: sentence on the logits.
        left_out: why there is no tokenizer for transformers; empty if there is one.
        results: sections on what the model scored.
    """
    loops = round(source.config.depth.mean)
    example = WITH_TOKENIZER
    if left_out:
        refused = (
            f"**There is no tokenizer for transformers here**, and AutoTokenizer does not load this folder: {left_out}."
        )
        encode = 'encode("def ", add_bos=True)' if source.has_bos else 'encode("def ")'
        example = f"{refused}\n{WITHOUT_TOKENIZER.replace(ENCODE, encode)}"
    parts = [
        f"# {quote_name(source.config.run.name)}",
        f"A recurrent-depth transformer: its core runs `loops` times, chosen at every call (default here {loops}).",
        f"## Use\n\n{example}",
        f"## Model\n\n{_format_table(_describe_model(source, dtype, size))}",
        f"## Training\n\n{_format_table(_describe_training(source))}",
        *results,
        f"## Check\n\n{parity} `{PARITY_FILE}` holds logits of fixed prompts; `python {CHECK_SCRIPT}`, with torch and "
        "transformers alone, says whether this folder gives the same on your machine.",
        f"Made by megatron_rdt {megatron_rdt.__version__}.",
    ]
    return HEADER + "\n\n".join(parts) + "\n"


def quote_name(name: str) -> str:
    """Return a name on one line and without characters that Markdown or a table would interpret."""
    return "".join(
        character if character.isalnum() or character in " ._-+:;,()=" else " " for character in name
    ).strip()


def _format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return a Markdown table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _describe_model(source: ExportSource, dtype: str, size: int) -> list[tuple[str, str]]:
    """Return names and values of what the network is."""
    model = source.config.model
    counts = {name: math.prod(shape) for name, shape in source.weights.shapes.items()}
    core = sum(count for name, count in counts.items() if name.startswith("core."))
    layers = f"{model.prelude_layers} in the prelude, {model.core_layers} in the core, {model.coda_layers} in the coda"
    halting = [("trained halting", model.halting)] if model.halting != "none" else []
    return [
        ("weights", f"{sum(counts.values()):,}, of which {core:,} are in the core; {dtype}, {size / 1e6:,.1f} MB"),
        ("layers", layers),
        ("width", f"{model.dim}, {model.heads} heads"),
        ("attention", model.attention + (f", window {model.window}" if model.window else "")),
        ("feed-forward of the core", model.core_ffn),
        ("injection", model.injection),
        ("initial state", model.state_init),
        *halting,
        ("vocabulary", f"{model.vocab_size - model.unused_ids:,}"),
    ]


def _describe_training(source: ExportSource) -> list[tuple[str, str]]:
    """Return names and values of what is known of the training."""
    config = source.config
    if isinstance(source.origin, dict) and source.step == 0:  # another project's: its training is not recorded here
        origin = source.origin
        return [
            ("converted from", f"{quote_name(str(origin.get('name')))}, {quote_name(str(origin.get('kind')))}"),
            ("longest sequence that is declared", f"{config.train.sequence_length:,} tokens"),
        ]
    names = [quote_name(corpus.name) for corpus in config.data.corpora()]
    weights = [f"{corpus.weight:g}" for corpus in config.data.corpora()]
    mixed = ", ".join(f"{name} (weight {weight})" for name, weight in zip(names, weights))
    began = [("began from the weights of", quote_name(source.began_from))] if source.began_from else []
    averaged = [("weights", f"their exponential moving average, decay {config.optimizer.ema:g}")] * source.is_average
    return [
        *began,
        *averaged,
        ("optimizer steps", f"{source.step:,}"),
        ("tokens", f"{source.tokens:,}"),
        ("sequences", f"{config.train.sequence_length:,} tokens, {config.train.global_batch:,} per step at the end"),
        ("data", mixed if len(names) > 1 else names[0]),
        ("T", describe_depth(config)),
        ("optimizer", f"{config.optimizer.name}, peak learning rate {config.optimizer.lr:g}"),
        ("precision", config.train.precision),
    ]


def describe_depth(config: RunConfig) -> str:
    """Return how T was chosen in training."""
    depth = config.depth
    if depth.scheme == "fixed":
        return f"always {depth.mean:g}"
    if depth.scheme == "difficulty":
        drawn = f"{depth.difficulty_slope:g} n + {depth.difficulty_offset:g} for an example of difficulty n"
    else:
        mean = DepthSampler(depth, config.run.seed).expected_loops
        drawn = f"drawn from {depth.scheme} with mean {mean:.3g}, per {depth.per.replace('_', '-')}"
    grown = "" if depth.curriculum == "none" else f"; grew over the first {depth.curriculum_steps:,} steps"
    return f"{drawn}, from {depth.min} to {depth.max}{grown}"
