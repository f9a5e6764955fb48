"""Validation loss of short runs with the layers' products in float32, bfloat16 and float8, on the CPU.

Every run is `configs/smoke.yaml` with more steps, on the corpus of `configs/smoke_data.yaml`; arms of one seed have the same
weights, batches and T. PyTorch multiplies float8 numbers on a CPU too, slowly and with the same rounding of the factors, so the
losses say what float8 costs in quality. `train.float8` itself is refused on a CPU: here the layers are not compiled.

    python benchmarks/float8_loss.py [--steps 200] [--seeds 2] [--data data/stdlib] [--out FILE.json]
"""

import statistics
from unittest.mock import patch

from tools.options import write_numbers
from tools.short_run import make_run_parser, prepare_data, read_last_losses, train_briefly
from tools.tables import format_header, format_row

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.layer import multiply_in_float8
from megatron_rdt.parallel import Engine

LOOPS = ("1", "4")
ARMS = {"float32": "float32", "bfloat16": "bfloat16", "float8": "bfloat16"}
CONFIGURE = Engine.configure_model


def configure_in_float8(engine: Engine, model: RecurrentDepthTransformer) -> None:
    """Do what `Engine.configure_model` does, and let the layers multiply in float8."""
    CONFIGURE(engine, model)
    multiply_in_float8(model)


def run_arm(arm: str, seed: int, steps: int, data: str) -> list[float]:
    """Train, and return the validation loss at each of LOOPS after the last step, computed in the precision of `ARMS`."""
    choice = {"train.precision": ARMS[arm], "eval.sequences": 256}
    configure = configure_in_float8 if arm == "float8" else CONFIGURE
    with patch.object(Engine, "configure_model", configure), train_briefly(seed, steps, data, choice) as run:
        losses = read_last_losses(run)
    return [losses[loops] for loops in LOOPS]


def main() -> None:
    """Run every arm with every seed, and print the table."""
    parser = make_run_parser(__doc__, steps=200, out=None)
    parser.add_argument("--seeds", type=int, default=2, help="number of runs of every arm")
    options = parser.parse_args()
    prepare_data(options.data)
    rows, first = [], []
    losses_at = [f"loss at T = {loops}" for loops in LOOPS]
    print(format_header(["products", *losses_at, "minus float32 at the last T, by seed"]))
    for arm in ARMS:
        found = [run_arm(arm, seed, options.steps, options.data) for seed in range(options.seeds)]
        first = first or found
        means = [statistics.mean(losses) for losses in zip(*found)]
        apart = ", ".join(f"{losses[-1] - exact[-1]:+.4f}" for losses, exact in zip(found, first))
        print(format_row([arm, *(f"{mean:.4f}" for mean in means), apart]), flush=True)
        rows.append({"products": arm, "losses": found})
    write_numbers(options, {"rows": rows})


if __name__ == "__main__":
    main()
