"""Validation loss against T of several checkpoints on the same windows: a table with paired errors, and a picture.

    python benchmarks/loop_curves.py --data data/stdlib cut=imports/dense looped=runs/looped dense=runs/dense:1

A name, the checkpoint or run, and after a colon the T at which it is judged: without it, that of the lowest loss. Errors
are standard errors over windows. Differences are to the last one at its own T, window by window, so that what makes a
window hard for all models does not count.
"""

import math
from pathlib import Path
from typing import Any

import torch
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row

from megatron_rdt.compare.pictures import draw_loss_against_loops
from megatron_rdt.config import DataConfig
from megatron_rdt.data import load_manifest, open_corpus, read_fixed_windows
from megatron_rdt.evaluate.loss import check_same_tokenizer
from megatron_rdt.evaluate.row_scores import score_rows
from megatron_rdt.inference import load

COLUMNS = ("model", "T", "loss", "error", "difference", "its error")


def estimate(losses: torch.Tensor) -> tuple[float, float]:
    """Return the mean and its standard error over windows, of values (windows,)."""
    return float(losses.mean()), float(losses.std()) / math.sqrt(len(losses))


def main() -> None:
    """Measure, print and draw."""
    parser = make_parser(__doc__, loops=[1, 2, 3, 4, 5, 8], batch=8, sequence=256, threads=1, out=None)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER[:T]")
    parser.add_argument("--sequences", type=int, default=454, help="validation windows")
    parser.add_argument("--data", default="data/stdlib", help="prepared corpus")
    parser.add_argument("--picture", type=Path, help="PNG file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    manifest = load_manifest(options.data)
    manifest.verify()
    corpus = open_corpus(manifest, "valid", options.sequence, 0, DataConfig(), pack=False)
    windows = read_fixed_windows(corpus, options.sequences)
    losses: dict[str, dict[int, torch.Tensor]] = {}
    own: dict[str, int] = {}
    for given in options.models:
        name, _, rest = given.partition("=")
        folder, _, judged = rest.partition(":")
        model, tokenizer = load(folder, "cpu")
        check_same_tokenizer(manifest, tokenizer, Path(folder))
        with torch.no_grad():
            scores = score_rows(model, windows, options.loops, options.batch, torch.device("cpu"))
        losses[name] = {t: each.losses / each.targets for t, each in scores.items()}
        own[name] = int(judged) if judged else min(losses[name], key=lambda t, of=losses[name]: float(of[t].mean()))

    reference = losses[name][own[name]]
    print(format_header(COLUMNS, left=1))
    rows: list[dict[str, Any]] = []
    for name, by_loops in losses.items():
        for t, each in by_loops.items():
            cells = [*estimate(each), *estimate(each - reference)]
            print(format_row([name, t, *(f"{cell:.4f}" for cell in cells)]), flush=True)
        means = {t: float(each.mean()) for t, each in by_loops.items()}
        rows.append({"arm": name, "losses": means, "loops": own[name], "loss": {"mean": means[own[name]]}})
    if options.picture is not None:
        draw_loss_against_loops(rows, options.picture)
    write_numbers(options, {"losses": {name: {t: estimate(x) for t, x in of.items()} for name, of in losses.items()}})


if __name__ == "__main__":
    main()
