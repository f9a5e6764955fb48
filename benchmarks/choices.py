"""Effect of each choice of one axis of the model on a tiny run: validation loss at several T, CPU time, parameters.

Every run is configs/smoke.yaml, longer, with that one choice changed: a model of width 64 that sees a few hundred
thousand tokens. It shows that a choice works and its cost, not which choice is best at scale.

    python benchmarks/choices.py [--axes injection signals] [--steps 400] [--seeds 0] [--data data/stdlib]

About 30 seconds per choice. If data/stdlib is missing, it is prepared first, as for the quickstart.
"""

import time
from statistics import mean
from typing import Any

import torch
from tools.short_run import make_run_parser, prepare_data, read_last_losses, train_briefly
from tools.tables import format_header, format_row

from megatron_rdt.config import load_config
from megatron_rdt.evaluate.report import read_records
from megatron_rdt.model import RecurrentDepthTransformer

LOOPS = (1, 4, 8, 16)
MLA = {"model.attention": "mla", "model.kv_rank": 32, "model.nope_dim": 16, "model.rope_dim": 8, "model.value_dim": 16}
MOE = {"model.core_ffn": "moe", "model.experts": 8, "model.experts_per_token": 2, "model.expert_dim": 96}
GROWING = {"depth.curriculum": "linear", "depth.curriculum_steps": 200}
RATES, MUON = (1e-3, 3e-3, 1e-2, 3e-2), {"optimizer.name": "muon"}
MUON_ALIKE = {**MUON, "optimizer.core_lr_scale": 1.0}
# axis -> name of a choice -> options
AXES: dict[str, dict[str, dict[str, object]]] = {
    "attention": {
        "gqa, 2 key heads of 4": {},
        "gqa, 1 key head": {"model.kv_heads": 1},
        "gqa, 4 key heads": {"model.kv_heads": 4},
        "mla, rank 32": dict(MLA),
        "mla, rank 32, query_rank 32": {**MLA, "model.query_rank": 32},
        "qk_norm plain": {"model.qk_norm": "plain"},
        "qk_norm learned": {"model.qk_norm": "learned"},
        "qk_bias": {"model.qk_bias": True},
        "value_embeddings gated": {"model.value_embeddings": "gated"},
        "rope_pairing adjacent": {"model.rope_pairing": "adjacent"},
        "window 16": {"model.window": 16},
        "document_mask": {"data.document_mask": True},
    },
    "feed-forward": {
        "swiglu": {},
        "relu2": {"model.ffn": "relu2"},
        "moe, 2 of 8": dict(MOE),
        "moe, 2 of 8, not balanced": {**MOE, "model.balance_rate": 0.0},
    },
    "depth": {
        "lognormal_poisson, mean 3 + 1": {},
        "fixed, 4": {"depth.scheme": "fixed", "depth.mean": 4},
        **{f"{s}, mean 4": {"depth.scheme": s, "depth.mean": 4} for s in ("uniform", "geometric", "poisson")},
        "per micro_batch": {"depth.per": "micro_batch"},
        "per sequence": {"depth.per": "sequence"},
        "backprop 2": {"depth.backprop": 2},
        "curriculum linear, of the mean": dict(GROWING),
        "curriculum one_minus_sqrt, of the mean": {**GROWING, "depth.curriculum": "one_minus_sqrt"},
        "curriculum linear, of k": {**GROWING, "depth.curriculum_of": "backprop", "depth.backprop": 4},
        "curriculum linear, of both": {**GROWING, "depth.curriculum_of": "both", "depth.backprop": 4},
    },
    "injection": {
        "diagonal, zoh": {},
        "diagonal, euler": {"model.discretization": "euler"},
        **{name: {"model.injection": name} for name in ("residual", "linear", "add", "gate")},
        "hyper, 4 lanes": {"model.injection": "hyper"},
        "diagonal, input and output matrix": {"model.input_matrix": True, "model.output_matrix": True},
    },
    "state": {name: {"model.state_init": name} for name in ("zero", "normal", "embedding", "encoded", "learned")},
    "signals": {
        "none": {},
        **{name: {"model.signals": [name]} for name in ("sinusoidal", "lora", "adaln")},
        "all": {"model.signals": ["sinusoidal", "lora", "adaln"]},
    },
    "norms": {
        "pre": {},
        **{name: {"model.norm_placement": name} for name in ("sandwich", "peri")},
        **{f"pre, core_norm {name}": {"model.core_norm": name} for name in ("iteration", "last", "last_shared")},
        "pre, encoded_norm false": {"model.encoded_norm": False},
    },
    "halting": {
        "none": {},
        **{f"act, weight {w}": {"model.halting": "act", "model.halting_weight": w} for w in (0.001, 0.01, 0.1)},
        **{f"gate, weight {w}": {"model.halting": "gate", "model.halting_weight": w} for w in (0.01, 0.1)},
    },
    "optimizer": {
        **{f"adamw, lr {lr}": {"optimizer.lr": lr} for lr in RATES},
        **{f"muon, lr {lr}": {**MUON, "optimizer.lr": lr} for lr in RATES},
        **{f"muon, lr {lr}, core_lr_scale 1": {**MUON_ALIKE, "optimizer.lr": lr} for lr in RATES[1:]},
    },
    "loss": {
        "plain": {},
        "z_loss 1e-4": {"train.z_loss": 1e-4},
        "logit_softcap 15": {"model.logit_softcap": 15},
    },
}


def train_choice(choice: dict[str, object], seed: int, steps: int, data: str) -> dict[str, Any]:
    """Train once; return the last metrics, "losses" by T, CPU "seconds" and the number of "parameters"."""
    common = {"eval.loops": list(LOOPS), "eval.sequences": 128, "schedule.warmup_steps": 15}
    began = time.process_time()
    with train_briefly(seed, steps, data, {**common, **choice}) as run:
        seconds = time.process_time() - began
        with torch.device("meta"):
            model = RecurrentDepthTransformer(load_config(run / "config.yaml").model)
        parameters = sum(p.numel() for p in model.parameters())
        metrics = read_records(run / "metrics.jsonl", {})[-1]
        return {**metrics, "losses": read_last_losses(run), "seconds": seconds, "parameters": parameters}


def main() -> None:
    """Prepare the text if it is missing, train every choice and print one Markdown table per axis."""
    parser = make_run_parser(__doc__, steps=400)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="axes of the model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed; their mean is shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare_data(options.data)
    for axis in options.axes:
        columns = [*(f"T = {t}" for t in LOOPS), "radius", "CPU s", "parameters"]
        print(f"\n{format_header([axis, *columns], left=1)}", flush=True)
        for name, settings in AXES[axis].items():
            runs = [train_choice(settings, seed, options.steps, options.data) for seed in options.seeds]
            losses = [f"{mean(r['losses'][str(t)] for r in runs):.3f}" for t in LOOPS]
            radius, seconds = max(r["spectral_radius"] for r in runs), mean(r["seconds"] for r in runs)
            figures = [*losses, f"{radius:.3f}", f"{seconds:.0f}", f"{runs[0]['parameters']:,}"]
            print(format_row([name, *figures]), flush=True)
            for r in runs:
                for key in ("ponder", "exit_iteration", "exit_entropy"):
                    if key in r:
                        print(f"<!-- {name}: {key} {r[key]:.3f}, loops {r['loops_mean']} -->", flush=True)


if __name__ == "__main__":
    main()
