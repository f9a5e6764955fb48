"""CPU and wall seconds of `rdt prep` as a whole, in this tree and in other checkouts: what its engine costs.

The Python sources of this environment as one JSONL file, and one existing tokenizer. Every process that a prep starts counts:
also one that it leaves behind, for which this process waits in its stead. The trees take turns.

    python benchmarks/prep_engines.py [--megabytes 5 50 124] [--trees . OTHER_CHECKOUT] [--out FILE.json]
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import find_python_sources
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row

from data_prep.config import PrepConfig
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer

PR_SET_CHILD_SUBREAPER = 36
SAMPLE = 4_000_000


def run_prep(tree: Path, words: list[str]) -> tuple[float, float]:
    """Run `rdt prep` of a tree; return the CPU seconds of all its processes, and the wall seconds until it ended."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "launch.cli", "prep", *words]
    subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, check=True)
    wall = time.perf_counter() - began
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure_trees(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return the CPU and wall seconds of each round, by size and tree."""
    texts = list(dict.fromkeys(find_python_sources(max(options.megabytes))))
    model = train_tokenizer(texts[:1000], PrepConfig(vocab_size=4096, tokenizer_sample_bytes=SAMPLE))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(model)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for megabytes in options.megabytes:
        source, left = folder / f"{megabytes}.jsonl", megabytes * 1_000_000
        with open(source, "w", encoding="utf-8") as file:
            for text in texts:
                if left > 0:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    left -= len(text.encode())
        words = [f"--sources={source}", f"--out={folder / 'out'}", f"--tokenizer={folder / 'tokenizer'}"]
        times = found[f"{megabytes} MB"] = {str(tree): [] for tree in options.trees}
        for _ in range(options.rounds):
            for tree in options.trees:
                times[str(tree)].append(run_prep(tree.resolve(), [*words, f"--workers={options.workers}"]))
                shutil.rmtree(folder / "out")
    return found


def main() -> None:
    """Print the best and the median of each tree and size."""
    parser = make_parser(__doc__, rounds=5, out=None)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[5, 50, 124])
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    # Processes whose parent ends become children of this one, which waits for them and so learns their CPU time.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure_trees(Path(folder), options)
    print(format_header(["text", "tree", "CPU s, best", "median", "wall s, best", "median"]))
    for size, trees in found.items():
        for tree, rounds in trees.items():
            cells = [f"{pick(values):.2f}" for values in zip(*rounds) for pick in (min, statistics.median)]
            print(format_row([size, tree, *cells]))
    write_numbers(options, found)


if __name__ == "__main__":
    main()
