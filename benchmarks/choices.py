"""What each choice of one axis of the model does to a tiny run: validation loss at several T, CPU time, parameters.

Every run is configs/smoke.yaml, longer, with that one choice changed: a model of width 64 that sees a few hundred
thousand tokens. It shows that a choice works and what it costs; which choice is best at scale it cannot show.

    python benchmarks/choices.py --data data/stdlib [--axes injection signals] [--steps 150] [--seeds 0 1]
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch

from megatron_rdt.config import load_config
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.train.trainer import train

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
LOOPS = (1, 4, 8, 16)
ACT = {"model.halting": "act"}
# axis -> name of a choice -> options
AXES: dict[str, dict[str, dict[str, object]]] = {
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


def run(options: dict[str, object], seed: int, steps: int, data: str) -> tuple[dict[str, float], float, int, dict]:
    """Train once: validation losses by T, CPU seconds, parameters, and the last record."""
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
            "eval.loops": json.dumps(LOOPS).replace("(", "[").replace(")", "]"),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for axis in options.axes:
        columns = " | ".join(f"T = {t}" for t in LOOPS)
        print(f"\n| {axis} | {columns} | radius | CPU s | parameters |\n|---|{'---:|' * (len(LOOPS) + 3)}", flush=True)
        for name, settings in AXES[axis].items():
            runs = [run(settings, seed, options.steps, options.data) for seed in options.seeds]
            losses = [sum(r[0][str(t)] for r in runs) / len(runs) for t in LOOPS]
            radius, seconds = max(r[3]["spectral_radius"] for r in runs), sum(r[1] for r in runs) / len(runs)
            figures = " | ".join(f"{loss:.3f}" for loss in losses)
            print(f"| {name} | {figures} | {radius:.3f} | {seconds:.0f} | {runs[0][2]:,} |", flush=True)
            for r in runs:
                for key in ("ponder", "exit_iteration", "exit_entropy"):
                    if key in r[3]:
                        print(f"<!-- {name}: {key} {r[3][key]:.3f}, loops {r[3]['loops_mean']} -->", flush=True)


if __name__ == "__main__":
    main()
