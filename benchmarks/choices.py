"""Effect of each choice of one axis of the model on a tiny run: validation loss at several T, CPU time, parameters.

Every run is configs/smoke.yaml, longer, with that one choice changed: a model of width 64 that sees a few hundred
thousand tokens. It shows that a choice works and its cost, not which choice is best at scale.

    python benchmarks/choices.py [--axes injection signals] [--steps 400] [--seeds 0] [--data data/stdlib]

About 30 seconds per choice. If data/stdlib is missing, it is prepared first, as for the quickstart.
"""

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from tools.options import make_parser
from tools.tables import format_header, format_row

from launch.cli import run_command
from megatron_rdt.config import load_config
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.train.trainer import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMOKE, SMOKE_DATA, DATA = CONFIGS / "smoke.yaml", CONFIGS / "smoke_data.yaml", "data/stdlib"
LOOPS = (1, 4, 8, 16)
ACT = {"model.halting": "act"}
MLA = {"model.attention": "mla", "model.kv_rank": 32, "model.nope_dim": 16, "model.rope_dim": 8, "model.value_dim": 16}
MOE = {"model.core_ffn": "moe", "model.experts": 8, "model.experts_per_token": 2, "model.expert_dim": 96}
GROWING = {"depth.curriculum": "linear", "depth.curriculum_steps": 200}
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
        "uniform, mean 4": {"depth.scheme": "uniform", "depth.mean": 4},
        "geometric, mean 4": {"depth.scheme": "geometric", "depth.mean": 4},
        "poisson, mean 4": {"depth.scheme": "poisson", "depth.mean": 4},
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
        "residual": {"model.injection": "residual"},
        "linear": {"model.injection": "linear"},
        "add": {"model.injection": "add"},
        "gate": {"model.injection": "gate"},
        "hyper, 4 lanes": {"model.injection": "hyper"},
        "diagonal, input and output matrix": {"model.input_matrix": True, "model.output_matrix": True},
    },
    "state": {name: {"model.state_init": name} for name in ("zero", "normal", "embedding", "encoded", "learned")},
    "signals": {
        "none": {},
        "sinusoidal": {"model.signals": "[sinusoidal]"},
        "lora": {"model.signals": "[lora]"},
        "adaln": {"model.signals": "[adaln]"},
        "all": {"model.signals": "[sinusoidal,lora,adaln]"},
    },
    "norms": {
        "pre": {},
        "sandwich": {"model.norm_placement": "sandwich"},
        "peri": {"model.norm_placement": "peri"},
        "pre, core_norm iteration": {"model.core_norm": "iteration"},
        "pre, core_norm last": {"model.core_norm": "last"},
        "pre, core_norm last_shared": {"model.core_norm": "last_shared"},
        "pre, encoded_norm false": {"model.encoded_norm": False},
    },
    "halting": {
        "none": {},
        "act, weight 0.001": {**ACT, "model.halting_weight": 1e-3},
        "act, weight 0.01": {**ACT, "model.halting_weight": 1e-2},
        "act, weight 0.1": {**ACT, "model.halting_weight": 1e-1},
        "gate, weight 0.01": {"model.halting": "gate"},
        "gate, weight 0.1": {"model.halting": "gate", "model.halting_weight": 1e-1},
    },
    "optimizer": {
        **{f"adamw, lr {lr}": {"optimizer.lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)},
        **{f"muon, lr {lr}": {"optimizer.name": "muon", "optimizer.lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)},
        **{
            f"muon, lr {lr}, core_lr_scale 1": {
                "optimizer.name": "muon",
                "optimizer.lr": lr,
                "optimizer.core_lr_scale": 1.0,
            }
            for lr in (3e-3, 1e-2, 3e-2)
        },
    },
    "loss": {
        "plain": {},
        "z_loss 1e-4": {"train.z_loss": 1e-4},
        "logit_softcap 15": {"model.logit_softcap": 15},
    },
}


def train_choice(
    options: dict[str, object], seed: int, steps: int, data: str
) -> tuple[dict[str, float], float, int, dict]:
    """Train once and return validation losses by T, CPU seconds, parameters, and the last record of metrics."""
    with tempfile.TemporaryDirectory() as root:
        words = {
            "run.root": root,
            "run.seed": seed,
            "data.path": data,
            "train.steps": steps,
            "train.device": "cpu",
            "schedule.warmup_steps": 15,
            "checkpoint.every": 0,
            "eval.every": steps,
            "eval.loops": json.dumps(LOOPS),
            "eval.sequences": 128,
            "sample.every": 0,
            "logging.tensorboard": False,
            **options,
        }
        texts = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in words.items()]
        config = load_config(SMOKE, texts)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in RecurrentDepthTransformer(config.model).parameters())
        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            status = train(config)
        seconds = time.process_time() - began
        assert status == 0, f"ended with status {status}"
        folder = Path(root) / config.run.name
        losses = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])["losses"]
        return losses, seconds, parameters, json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    """Print one Markdown table per axis."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default=DATA, help="prepared text")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="axes of the model")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed; their mean is shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.data == DATA and not Path(DATA).exists():
        assert run_command(["prep", "--config", str(SMOKE_DATA)]) == 0
    for axis in options.axes:
        columns = [*(f"T = {t}" for t in LOOPS), "radius", "CPU s", "parameters"]
        print(f"\n{format_header([axis, *columns], left=1)}", flush=True)
        for name, settings in AXES[axis].items():
            runs = [train_choice(settings, seed, options.steps, options.data) for seed in options.seeds]
            losses = [sum(r[0][str(t)] for r in runs) / len(runs) for t in LOOPS]
            radius, seconds = max(r[3]["spectral_radius"] for r in runs), sum(r[1] for r in runs) / len(runs)
            figures = [*(f"{loss:.3f}" for loss in losses), f"{radius:.3f}", f"{seconds:.0f}", f"{runs[0][2]:,}"]
            print(format_row([name, *figures]), flush=True)
            for r in runs:
                for key in ("ponder", "exit_iteration", "exit_entropy"):
                    if key in r[3]:
                        print(f"<!-- {name}: {key} {r[3][key]:.3f}, loops {r[3]['loops_mean']} -->", flush=True)


if __name__ == "__main__":
    main()
