"""Collectives of one optimizer step of every engine, against T.

Four processes on this machine, two micro-batches per process and step. The last two engines are there for comparison:
wrappings that do not know of the loop, and gather the core again in every iteration.

    python benchmarks/collectives.py [--loops 1 4 16 64] [--out FILE.json]
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tools.collective_cases import COMPARISONS, ENGINES, GROWING, build_case
from tools.options import make_parser, repeat_options, write_numbers
from tools.processes import run_ranks
from tools.tables import format_header, format_row

from megatron_rdt.config import ModelConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.environment import leave_process
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import MicroBatch
from megatron_rdt.parallel.collective_counter import record_collectives, sum_by_kind

PROCESSES, ACCUMULATION, SEQUENCE = 4, 2, 16
LABELS = (*ENGINES, *GROWING, *COMPARISONS)
# Column -> phases and kinds of collectives that it counts.
COLUMNS = {
    "gathers in forward": ["forward all-gather"],
    "gathers in backward": ["backward all-gather"],
    "gathers after the step": ["update all-gather"],
    "gradient reductions": ["backward all-reduce", "backward reduce-scatter"],
}


def run_worker(options: argparse.Namespace) -> None:
    """Count every engine's collectives as one of the ranks; rank 0 writes them to --worker; end the process."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    model = ModelConfig()
    counted: dict[str, Any] = {}
    for label in LABELS:
        engine = build_case(label, model, PROCESSES * ACCUMULATION, 1)
        tokens = torch.zeros(1, SEQUENCE + 1, dtype=torch.int64)
        for loops in (1, 1, *options.loops):  # the first two steps set things up
            batch = [MicroBatch(Batch(tokens), DepthPlan.constant(loops, 1)) for _ in range(ACCUMULATION)]
            counted.setdefault(label, {})[loops] = sum_by_kind(record_collectives(engine, batch))
    if dist.get_rank() == 0:
        parameters = RecurrentDepthTransformer(model).parameters()
        counted["parameters"] = sum(parameter.numel() for parameter in parameters)
        options.worker.write_text(json.dumps(counted))
    dist.barrier()
    leave_process(0)


def format_table(counted: dict[str, Any], loops: list[int]) -> str:
    """Format a Markdown table: one line per engine and group of T values with the same collectives."""
    lines = [format_header(["Engine", "T", *COLUMNS, "other calls", "MB in all"], left=1)]
    for label in LABELS:
        rows: dict[str, list[int]] = {}
        for t in loops:
            rows.setdefault(format_cells(dict(counted[label][str(t)])), []).append(t)
        lines += [format_row([label, ", ".join(map(str, same)), cells]) for cells, same in rows.items()]
    return "\n".join(lines).replace("| 0 (0.0 MB)", "| 0")


def format_cells(row: dict[str, tuple[int, int]]) -> str:
    """Remove the columns from `row`; return cells: calls (MB) of each and of all other collectives, MB in all."""
    total = sum(size for _, size in row.values()) / 1e6
    found = [[row.pop(kind, (0, 0)) for kind in kinds] for kinds in COLUMNS.values()] + [list(row.values())]
    cells = [f"{sum(number for number, _ in cell)} ({sum(size for _, size in cell) / 1e6:.1f} MB)" for cell in found]
    return f"{' | '.join(cells)} | {total:.1f}"


def main() -> None:
    """Count on several processes and print the table."""
    parser = make_parser(__doc__, loops=[1, 4, 16, 64], out=None)
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    options = parser.parse_args()
    if options.worker:
        run_worker(options)
        return
    counted = run_ranks(__file__, PROCESSES, *repeat_options(options, ("loops",)))
    parameters = f"{counted['parameters']:,} parameters ({4 * counted['parameters'] / 1e6:.2f} MB)"
    what = f"One optimizer step on {PROCESSES} processes, {ACCUMULATION} micro-batches each, {parameters}"
    print(f"{what}: calls and megabytes.\n\n{format_table(counted, options.loops)}")
    write_numbers(options, counted)


if __name__ == "__main__":
    main()
