"""Speed of generation, and the loss that exit rules and cache budgets cost.

Three tables:

- one row at T = 8 with and without a cache, on an untrained model with 2 layers each before, in and after the loop;
- every exit rule, its threshold chosen so that tokens run about half of T = 8, against fixed T = 8: tokens per second at
  one row and at many, the loss of the predictions made under the rule;
- cache budgets: numbers kept per position, and the loss when tokens are decoded one by one.

The last two take a checkpoint (runs/quickstart where it exists) and its validation text; without one they take an
untrained model and random tokens, and no loss is shown. The rules act and gate need a halting unit; a model that has none
is given one with random weights, for the speed alone.

Times are the best of several interleaved rounds; with one thread on the CPU they are the CPU time of the process, which
other programs hardly change, otherwise wall time.

    python benchmarks/generation.py [--checkpoint RUN --data FOLDER] [--rounds 3] [--out FILE.json]
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_in_turn, pick_device
from torch.nn import functional

from megatron_rdt.config import DataConfig, ModelConfig
from megatron_rdt.data import read_fixed_windows
from megatron_rdt.evaluate.loss import open_validation_corpus
from megatron_rdt.inference import ExitRule, ExitTrace, GenerationTrace, KVCache, generate, load
from megatron_rdt.model import RecurrentDepthTransformer as Model
from megatron_rdt.model import initialize

LOOPS, PROMPT = 8, 32
RUN, DATA = "runs/quickstart", "data/stdlib"
CERTAIN = 6.0  # nats, the second threshold of kl_entropy
RULES = ("change", "second_difference", "kl", "kl_entropy", "act", "gate")
BUDGETS = (1, 2, 4, 8)
Row = dict[str, Any]


def make_rule(kind: str, threshold: float) -> ExitRule | None:
    """Make an exit rule, with CERTAIN as the second threshold of kl_entropy; None for "fixed"."""
    if kind == "fixed":
        return None
    return ExitRule(kind, threshold, CERTAIN) if kind == "kl_entropy" else ExitRule(kind, threshold)


def add_halting(model: Model, kind: str) -> Model:
    """Return the model, or a copy with an untrained halting unit if the rule needs one that it does not have."""
    if kind not in ("act", "gate") or kind == model.config.halting:
        return model
    device = next(model.parameters()).device
    other = Model(dataclasses.replace(model.config, halting=kind, halting_threshold=1.0))
    other.load_state_dict(model.state_dict(), strict=False)
    unit = other.core.halting
    with torch.no_grad():
        unit.weight.normal_(0, 1 / model.config.dim**0.5, generator=torch.Generator().manual_seed(0))
        unit.bias.fill_(-1.5)
    return other.eval().to(device)


@torch.no_grad()
def evaluate_rule(model: Model, windows: torch.Tensor, rule: ExitRule | None) -> tuple[float, float]:
    """Mean iterations per token and mean loss of one forward pass over windows (n, L + 1)."""
    trace = ExitTrace()
    logits = model(windows[:, :-1], LOOPS, exit_rule=rule, trace=trace)
    assert trace.iterations is not None
    loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    return float(trace.iterations.float().mean()), float(loss)


def find_threshold(model: Model, windows: torch.Tensor, kind: str) -> float:
    """Bisect the threshold's logarithm until tokens run about T / 2; return it, or the last of 12 tries."""
    grows = kind in ("act", "gate")  # for these, a larger threshold means more iterations
    low, high = 1e-6, 1.0 if grows else 1e2
    for _ in range(12):
        middle = (low * high) ** 0.5
        mean, _ = evaluate_rule(model, windows, make_rule(kind, middle))
        if abs(mean - LOOPS / 2) < 0.1:
            return middle
        low, high = (middle, high) if (mean < LOOPS / 2) == grows else (low, middle)
    return middle


def measure_fastest(cases: dict[str, Any], options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Least seconds of each function over interleaved rounds."""
    times = measure_in_turn(cases, options.rounds, make_clock(device, options.threads))
    return {name: min(seconds) for name, seconds in times.items()}


def compare_cache(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Generate with an untrained model; return the rows of the first table, tokens/s with a cache and without."""
    shape = {"prelude_layers": 2, "core_layers": 2, "coda_layers": 2, "heads": 4, "kv_heads": 4}
    model = Model(ModelConfig(vocab_size=4096, dim=256, ffn_dim=1024, **shape))
    model = initialize(model, 0).eval().to(device)
    prompt = torch.arange(PROMPT, device=device)[None]
    run = partial(generate, model, prompt, LOOPS, options.tokens)
    best = measure_fastest({"yes": run, "no": partial(run, use_cache=False)}, options, device)
    return [{"cache": name, "tokens/s": round(options.tokens / seconds, 1)} for name, seconds in best.items()]


def compare_rules(options: argparse.Namespace, model: Model, windows: torch.Tensor, trained: bool) -> list[Row]:
    """Rows of the second table, one per rule: threshold, mean iterations, tokens per second, loss."""
    device, rows, cases = windows.device, [], {}
    for kind in ("fixed", *RULES):
        own = add_halting(model, kind)
        threshold = 0.0 if kind == "fixed" else find_threshold(own, windows[:4], kind)
        rule = make_rule(kind, threshold)
        mean, loss = evaluate_rule(own, windows, rule)
        shown = f"{loss:.4f}" if trained and own is model else "-"
        row = {"rule": kind, "threshold": f"{threshold:.2g}", "mean T, text given": round(mean, 2), "loss": shown}
        rows.append(row)
        for batch in (1, options.batch):
            prompts = windows[:1].expand(batch, -1) if batch > len(windows) else windows[:batch]
            sampling = {"temperature": 0.8, "top_k": 50, "exit_rule": rule}
            continue_text = partial(generate, own, prompts[:, :PROMPT], LOOPS, options.tokens, **sampling)
            trace = GenerationTrace()
            continue_text(trace=trace)
            row[f"mean T, {batch} rows"] = round(trace.mean, 2)
            cases[f"{kind} {batch}"] = continue_text
    best = measure_fastest(cases, options, device)
    for row in rows:
        for batch in (1, options.batch):
            row[f"tokens/s, {batch} rows"] = round(batch * options.tokens / best[f"{row['rule']} {batch}"], 1)
    return rows


@torch.no_grad()
def compare_budgets(model: Model, windows: torch.Tensor, trained: bool) -> list[Row]:
    """Rows of the third table, one per cache budget: numbers kept, loss, share of other likeliest tokens.

    Tokens are decoded one by one; the largest budget, which comes first, is exact.
    """
    rows, exact = [], None
    for budget in reversed(BUDGETS):
        cache = KVCache(budget)
        steps = [model(windows[:, [i]], LOOPS, cache=cache, start=i) for i in range(windows.shape[1] - 1)]
        logits = torch.cat(steps, 1).float()
        loss = float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
        exact = logits.argmax(-1) if exact is None else exact
        differs = float((logits.argmax(-1) != exact).float().mean())
        kept = cache.elements // len(windows)
        row = {"budget": budget, "numbers per position": kept, "loss": f"{loss:.4f}" if trained else "-"}
        rows.append(row | {"other likeliest token": f"{100 * differs:.1f} %"})
    return rows


def format_table(rows: list[Row]) -> str:
    """Markdown: one line per row, with the keys of the first as the header."""
    return "\n".join([format_header(list(rows[0])), *(format_row(row.values()) for row in rows)])


def load_windows(options: argparse.Namespace) -> tuple[Model, torch.Tensor, bool]:
    """Load a model and text windows (n, L + 1), or make random ones; return both and True if they were loaded."""
    device = pick_device()
    if options.checkpoint or Path(RUN).exists():
        model, _ = load(options.checkpoint or RUN, device)
        corpus = open_validation_corpus(options.data, options.length, 0, DataConfig())
        return model, read_fixed_windows(corpus, options.sequences).tokens.to(device), True
    model = initialize(Model(ModelConfig(ffn_dim=512)), 0).eval().to(device)
    shape, generator = (options.sequences, options.length + 1), torch.Generator().manual_seed(0)
    return model, torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device), False


def main() -> None:
    """Print the three tables."""
    parser = make_parser(__doc__, rounds=3, threads=1, out=None)
    parser.add_argument("--checkpoint", help=f"run, checkpoint or export; {RUN} where it exists")
    parser.add_argument("--data", default=DATA, help="prepared text for the losses")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per row")
    parser.add_argument("--batch", type=int, default=16, help="rows of the batch")
    parser.add_argument("--sequences", type=int, default=16, help="windows of text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, windows, trained = load_windows(options)
    results = {
        "cached": compare_cache(options, windows.device),
        "exit rules": compare_rules(options, model, windows, trained),
        "cache budgets": compare_budgets(model, windows, trained),
    }
    kind = "a checkpoint" if trained else "an untrained model and random tokens"
    print(f"T = {LOOPS}, prompts of {PROMPT} tokens, {options.tokens} new ones. Rules and budgets: {kind}.")
    for name, rows in results.items():
        print(f"\n{name}\n\n{format_table(rows)}")
    write_numbers(options, results)


if __name__ == "__main__":
    main()
