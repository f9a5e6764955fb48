"""Memory that a long prompt takes: of an export in transformers and of `rdt generate`, beside a Llama of equal weights.

One prompt is read and one token generated. Each row is a process of its own; memory is resident memory at its peak, above that
of the process with the loaded model. The last rows ask for the logits of all positions, which nothing else makes. Keys and
values of a looped model grow with T; the column says how much of the peak they are.

    python benchmarks/prompt_memory.py [--sequence 2048] [--dim 256] [--loops 1 8] [--out FILE.json]
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from tools.options import make_parser, repeat_options, write_numbers
from tools.processes import run_fresh
from tools.resident_memory import measure_growth
from tools.tables import format_header, format_row

from megatron_rdt.config import ModelConfig
from megatron_rdt.inference import generate
from megatron_rdt.model import RecurrentDepthTransformer, initialize

VOCABULARY, HEADS, PRELUDE, CORE, CODA = 32_768, 4, 2, 4, 2
NAMES = {
    "llama": "Llama, `generate`",
    "export": "export, `generate`",
    "own": "`rdt generate`",
    "llama_all": "Llama, logits of all positions",
    "export_all": "export, logits of all positions",
}
MB = 1e6


def make_config(dim: int) -> ModelConfig:
    """Return the config of the looped model."""
    layers = {"prelude_layers": PRELUDE, "core_layers": CORE, "coda_layers": CODA}
    return ModelConfig(vocab_size=VOCABULARY, dim=dim, heads=HEADS, kv_heads=HEADS, ffn_dim=4 * dim, **layers)


def make_run(kind: str, dim: int, tokens: torch.Tensor, loops: int) -> tuple[torch.nn.Module, Callable[[], object]]:
    """Return a model and the function that reads the prompt with it."""
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    model: Any
    if kind == "own":
        model = initialize(RecurrentDepthTransformer(make_config(dim)), 0).eval()
        return model, lambda: generate(model, tokens, loops=loops, new_tokens=1, temperature=0)
    if kind.startswith("llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "hidden_size": dim,
            "num_attention_heads": HEADS,
            "intermediate_size": 4 * dim,
            "vocab_size": VOCABULARY,
        }
        config = LlamaConfig(
            **sizes,
            num_hidden_layers=PRELUDE + CORE + CODA,
            max_position_embeddings=2 * tokens.shape[1],
            tie_word_embeddings=True,
        )
        model, options = LlamaForCausalLM(config).eval(), {}
    else:
        from megatron_rdt.convert.hf_wrapper import RdtConfig, RdtForCausalLM

        model = RdtForCausalLM(RdtConfig(model=vars(make_config(dim)))).eval()
        options = {"loops": loops}
    if kind.endswith("_all"):
        return model, lambda: model(tokens, use_cache=True, **options)
    return model, lambda: model.generate(tokens, **options, **settings)


def measure(kind: str, dim: int, sequence: int, loops: int) -> dict[str, float]:
    """Return weights and memory of a kind at a T, in millions."""
    torch.set_num_threads(1)
    tokens = torch.randint(4, VOCABULARY, (1, sequence), generator=torch.Generator().manual_seed(0))
    model, run = make_run(kind, dim, tokens, loops)
    layers = PRELUDE + (1 if kind.startswith("llama") else loops) * CORE + CODA
    with torch.no_grad():
        growth = measure_growth(run)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"weights": weights / MB, "memory": growth / MB, "cache": layers * 2 * sequence * dim * 4 / MB}


def main(options: argparse.Namespace) -> None:
    """Measure every kind in processes of its own, print the table."""
    if options.kind:
        print(json.dumps(measure(options.kind, options.dim, options.sequence, *options.loops)))
        return
    print(format_header(("", "T", "weights", "memory, MB", "of it keys and values"), left=1))
    rows = []
    for kind, name in NAMES.items():
        for loops in [1] if kind.startswith("llama") else options.loops:
            words = repeat_options(options, ("dim", "sequence"))
            found = run_fresh(__file__, "--kind", kind, "--loops", str(loops), *words, return_freed_blocks=True)
            rows.append({"kind": kind, "loops": loops, **found})
            cells = (f"{found['weights']:.1f} M", f"{found['memory']:.0f}", f"{found['cache']:.0f}")
            print(format_row((name, "" if kind.startswith("llama") else loops, *cells)), flush=True)
    write_numbers(options, {"rows": rows})


if __name__ == "__main__":
    parser = make_parser(__doc__, loops=[1, 8], dim=256, sequence=2048, out=None)
    parser.add_argument("--kind", choices=sorted(NAMES), help="measure this kind at one T, in this process")
    main(parser.parse_args())
