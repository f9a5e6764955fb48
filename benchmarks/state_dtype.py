"""Validation loss of short runs with the optimizer's moments in float32 and in bfloat16, rounded at random or to the nearest.

Every run is `configs/smoke.yaml` with more steps, on the corpus of `configs/smoke_data.yaml`; the arms of one seed have the
same weights, batches and T, so the difference from float32 is what rounding does. The last column is the bytes of the
optimizer's state in the checkpoint.

    python benchmarks/state_dtype.py [--steps 200] [--seeds 3] [--data data/stdlib] [--out FILE.json]
"""

import statistics
from unittest.mock import patch

import torch
from tools.options import write_numbers
from tools.short_run import make_run_parser, prepare_data, read_last_losses, train_briefly
from tools.tables import format_header, format_row

from megatron_rdt.parallel import rounded_adamw

ROUND_AT_RANDOM = rounded_adamw.round_at_random


def round_to_nearest(values: torch.Tensor, step: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """Round as a plain conversion does."""
    return values.to(rounded_adamw.STATE_DTYPE)


ARMS = {
    "float32": ("float32", ROUND_AT_RANDOM),
    "bfloat16, at random": ("bfloat16", ROUND_AT_RANDOM),
    "bfloat16, to the nearest": ("bfloat16", round_to_nearest),
}


def run_arm(arm: str, beta2: float, seed: int, steps: int, data: str) -> tuple[float, int]:
    """Train, and return the validation loss at T = 4 after the last step, and the bytes of the optimizer's state."""
    dtype, rounding = ARMS[arm]
    choice = {"optimizer.state_dtype": dtype, "optimizer.beta2": beta2, "eval.sequences": 256}
    with (
        patch.object(rounded_adamw, "round_at_random", rounding),
        train_briefly(seed, steps, data, choice) as run,
    ):
        files = (run / "checkpoints").rglob("optimizer/*.distcp")
        return read_last_losses(run)["4"], sum(file.stat().st_size for file in files)


def main() -> None:
    """Run every arm with every seed, and print the table."""
    parser = make_run_parser(__doc__, steps=200, out=None)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of every arm")
    options = parser.parse_args()
    prepare_data(options.data)
    rows = []
    print(format_header(["beta2", "moments", "loss", "minus float32, by seed", "state, bytes"]))
    for beta2 in (0.95, 0.999):
        found = {
            arm: [run_arm(arm, beta2, seed, options.steps, options.data) for seed in range(options.seeds)]
            for arm in ARMS
        }
        for arm, results in found.items():
            losses = [loss for loss, _ in results]
            apart = [loss - other for loss, (other, _) in zip(losses, found["float32"])]
            cells = [f"{beta2}", arm, f"{statistics.mean(losses):.4f}", ", ".join(f"{d:+.6f}" for d in apart)]
            print(format_row([*cells, f"{results[0][1]:,}"]), flush=True)
            rows.append({"beta2": beta2, "moments": arm, "losses": losses, "bytes": results[0][1]})
    write_numbers(options, {"rows": rows})


if __name__ == "__main__":
    main()
