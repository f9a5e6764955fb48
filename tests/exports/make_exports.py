"""Write small exports with random weights, and what our own code computes with them.

The tests beside this file read nothing else, so they also run where this project is not installed.
"""

import dataclasses
import sysconfig
from pathlib import Path
from typing import Any

import torch

from data_prep.config import PrepConfig
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer
from data_prep.stages.tokenizer.write_tokenizer import write_tokenizer
from megatron_rdt.checkpoint import StoredWeights
from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.convert.hf import ExportOptions, ExportSource
from megatron_rdt.convert.hf_export import write_export
from megatron_rdt.data import Tokenizer
from megatron_rdt.inference import ExitRule, generate
from megatron_rdt.model import RecurrentDepthTransformer, initialize

SIZES = {"vocab_size": 512, "dim": 64, "heads": 4, "kv_heads": 2}
# Together they have every part whose weights are read in a way of its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent": {
        **{"attention": "mla", "kv_rank": 31, "nope_dim": 8, "rope_dim": 4, "value_dim": 8, "query_rank": 16},
        **{"core_ffn": "moe", "experts": 4, "expert_dim": 32, "injection": "linear", "tie_embeddings": False},
        **{"state_init": "normal", "halting": "act", "signals": ["sinusoidal", "lora"]},
    },
    "valued": {
        **{"value_embeddings": "gated", "injection": "hyper", "halting": "gate", "qk_bias": True, "qk_norm": "learned"},
        **{"input_matrix": True, "output_matrix": True, "signals": ["adaln"], "state_init": "learned", "window": 12},
        **{"norm_placement": "sandwich", "core_norm": "iteration", "scale_embedding": True, "logit_softcap": 20.0},
    },
    "rounded": {},
    "gated": {"injection": "gate", "tie_embeddings": False, "core_norm": "last_shared", "state_init": "embedding"},
}
# Dtype and size of the files of a variant's weights; by default one file of float32.
FILES = {"latent": ("float32", "100KB"), "rounded": ("bfloat16", "100KB")}
torch.set_num_threads(1)
LENGTH = 64  # of the training sequences, as the config says
EXITS = {"change": 0.9, "kl": 0.3}
# Requests of lm_eval: contexts with their continuations, texts, and prompts with what ends their continuations. One of each
# is longer than the training sequences.
PAIRS = [
    ("def loads(s, *, cls", "=None):"),
    ("import", " json"),
    ("raise Value", "Error"),
    ("x = 1, " * 40 + "x", " = 2"),
]
WHOLE_TEXTS = ["def dump(obj, fp):", "\n".join(f"value_{i} = float({i})" for i in range(20))]
PROMPTS, STOPS, NEW_TOKENS = ["def ", "    return the", "import re\n", "x = 1, " * 40], ["a", "("], 12
# Arguments of lm_eval's model, and those of ours.
HARNESS: dict[str, dict[str, Any]] = {
    **{f"loops={loops}": {"loops": loops} for loops in (1, 4, 8)},
    "loops=6,exit=change,exit_threshold=0.9,exit_min_loops=2": {
        "loops": 6,
        "exit_rule": ExitRule("change", EXITS["change"], min_loops=2),
    },
}


def make_model(parts: dict[str, Any]) -> RecurrentDepthTransformer:
    """A model with random weights, larger than at the start of a run, so that every part shows in the logits."""
    model = initialize(RecurrentDepthTransformer(ModelConfig(**{**SIZES, **parts})), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
            if name.endswith("embedding.weight"):
                parameter.mul_(4)
    return model.eval()


@torch.no_grad()
def expect(model: RecurrentDepthTransformer) -> dict[str, Any]:
    """Results of our own code that the export must give too."""
    tokens = torch.randint(4, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    rules = {kind: ExitRule(kind, threshold, min_loops=2) for kind, threshold in EXITS.items()}
    prompt = tokens[:1, :9]
    padded = [tokens[0, :9].tolist(), tokens[1, :5].tolist()]
    documents = (torch.arange(20) >= 8).long().expand(2, -1)
    positions = torch.cat((torch.arange(8), torch.arange(12)))
    return {
        "tokens": tokens,
        "logits": {loops: model(tokens, loops) for loops in (1, 3, 6)},
        "packed": model(tokens, 3, documents=documents, positions=positions),
        "exits": {kind: model(tokens, 6, exit_rule=rule) for kind, rule in rules.items()},
        "continued": {loops: generate(model, prompt, loops, 12, temperature=0) for loops in (2, 4, 6)},
        "continued_padded": generate(model, padded, 4, 12, temperature=0),
        "continued_exits": {
            kind: generate(model, prompt, 6, 12, temperature=0, exit_rule=rule) for kind, rule in rules.items()
        },
        "continued_budget": generate(model, prompt, 6, 12, temperature=0, cache_budget=2),
    }


@torch.no_grad()
def answer_requests(
    model: RecurrentDepthTransformer, tokenizer: Tokenizer, loops: int, **settings: Any
) -> dict[str, list[Any]]:
    """Answers to the requests above, one at a time: log-probabilities, True if greedy decoding agrees, and new ids."""

    def score(ids: list[int], scored: int) -> tuple[float, bool]:
        ids = ids[-LENGTH - 1 :]
        logits = model(torch.tensor([ids[:-1]]), loops, **settings)[0, -scored:].double()
        targets = torch.tensor(ids[-scored:])
        picked = logits.log_softmax(-1).gather(1, targets[:, None])
        return float(picked.sum()), bool((logits.argmax(-1) == targets).all())

    def score_text(text: str) -> float:
        ids = [tokenizer.eos, *tokenizer.encode(text)]
        ends = [min(first + LENGTH, len(ids)) for first in range(1, len(ids), LENGTH)]
        begins = [1, *ends[:-1]]
        return sum(score(ids[:end], end - begin)[0] for begin, end in zip(begins, ends))

    def continue_text(prompt: str) -> list[int]:
        ids = tokenizer.encode(prompt)[-(LENGTH - NEW_TOKENS) :]
        (whole,) = generate(model, [ids], loops, NEW_TOKENS, temperature=0, eos=tokenizer.eos, **settings)
        return whole[len(ids) :]

    pairs = [(tokenizer.encode(context), tokenizer.encode(context + more)) for context, more in PAIRS]
    return {
        "scores": [score(whole, len(whole) - len(context)) for context, whole in pairs],
        "texts": [score_text(text) for text in WHOLE_TEXTS],
        "continuations": [continue_text(prompt) for prompt in PROMPTS],
    }


def write_exports(out: Path, variants: dict[str, dict[str, Any]] = VARIANTS) -> None:
    """Write a folder per variant, its weights those of `make_model`, with what is expected in `given.pt`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted((library / "json").glob("*.py"))]
    tokenizer = out / "tokenizer"
    write_tokenizer(
        train_tokenizer(texts, PrepConfig(vocab_size=512, tokenizer_sample_bytes=100_000)), tokenizer, texts
    )
    base = RunConfig()
    for name, parts in variants.items():
        model, folder = make_model(parts), out / name
        folder.mkdir(parents=True)
        if "bfloat16" in FILES.get(name, ()):
            model.bfloat16().float()  # what the files will hold
        config = dataclasses.replace(
            base,
            model=model.config,
            train=dataclasses.replace(base.train, sequence_length=LENGTH),
            depth=dataclasses.replace(base.depth, mean=4),
        )
        weights = model.state_dict()
        stored = StoredWeights({key: value.shape for key, value in weights.items()}, weights.__getitem__)
        source = ExportSource(folder, config, stored, tokenizer, has_bos=False)
        write_export(folder, source, ExportOptions(*FILES.get(name, ())))
        requests = {"pairs": PAIRS, "texts": WHOLE_TEXTS, "prompts": PROMPTS, "stops": STOPS, "new_tokens": NEW_TOKENS}
        answers = {given: answer_requests(model, Tokenizer(tokenizer), **own) for given, own in HARNESS.items()}
        torch.save(expect(model) | {"requests": requests, "answers": answers}, folder / "given.pt")
