"""What every engine sends over the network in one optimizer step, against T.

Four processes on this machine, two micro-batches per process and step. The last two engines are there for comparison:
wrappings that do not know of the loop, and gather the core again at every iteration.

    python benchmarks/collectives.py [--loops 1 4 16 64] [--out FILE.json]
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from launch.local_processes import find_free_port
from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.environment import leave_process
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, MicroBatch, make_engine
from megatron_rdt.parallel.collective_counter import record_collectives, sum_by_kind
from megatron_rdt.parallel.fsdp import FullyShardedEngine

PROCESSES, ACCUMULATION, SEQUENCE = 4, 2, 16
# What each engine is, as options of `parallel`.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "fsdp kept-gathered": {"engine": "fsdp", "reshard_after_forward": False},
    "fsdp replicate 2": {"engine": "fsdp", "replicate": 2},
    "fsdp reduce per_micro_batch": {"engine": "fsdp", "reduce": "per_micro_batch"},
    "zero1": {"engine": "zero1"},
    "zero2": {"engine": "zero2"},
    "zero3": {"engine": "zero3"},
}
# What goes over the network in every iteration, by design.
GROWING: dict[str, dict[str, Any]] = {
    "fsdp core_gather per_layer": {"engine": "fsdp", "core_gather": "per_layer"},
    "fsdp tensor 2": {"engine": "fsdp", "tensor": 2},
    "fsdp context 2": {"engine": "fsdp", "context": 2},
    "fsdp expert 2": {"engine": "fsdp", "expert": 2},
}
COMPARISONS: dict[str, dict[str, Any]] = {
    "fsdp layer-units": {"engine": "fsdp"},
    "zero3 no-leaf-modules": {"engine": "zero3"},
}


class LayerUnitsEngine(FullyShardedEngine):
    """The wrapping that one would write without knowing of the loop: every layer its own unit, the core none."""

    def _apply_fsdp(self, model: RecurrentDepthTransformer) -> None:
        for unit in (*model.prelude, *model.core.layers, *model.coda, model):
            fully_shard(unit, mesh=self.meshes.state)


@contextlib.contextmanager
def without_leaf_modules() -> Any:
    """ZeRO-3 as it is when nobody tells it which module owns the loop."""
    from megatron_rdt.parallel.zero import import_deepspeed

    utilities = import_deepspeed().utils
    mark, utilities.set_z3_leaf_modules = utilities.set_z3_leaf_modules, lambda *_: None
    yield
    utilities.set_z3_leaf_modules = mark


def build(label: str, model_config: ModelConfig, global_batch: int, micro_batch: int) -> Engine:
    """The engine of a label out of ENGINES, GROWING or COMPARISONS, or "single", on the CPU."""
    parallel = {"single": {"engine": "single"}, **ENGINES, **GROWING, **COMPARISONS}[label]
    if parallel.get("expert", 1) > 1:
        model_config = replace(model_config, core_ffn="moe")
    config = RunConfig(
        model=model_config,
        train=TrainConfig(global_batch=global_batch, micro_batch=micro_batch, device="cpu"),
        parallel=ParallelConfig(**parallel),
    )
    cpu = torch.device("cpu")
    engine = LayerUnitsEngine(config, cpu) if label == "fsdp layer-units" else make_engine(config, cpu)
    if label == "single":  # alone, also inside a process group
        engine.rank, engine.world_size = 0, 1
    with torch.device("meta"):
        model = RecurrentDepthTransformer(model_config)
    with without_leaf_modules() if label == "zero3 no-leaf-modules" else contextlib.nullcontext():
        engine.setup(model)
    return engine


def work(options: argparse.Namespace) -> None:
    """One of the processes: count, and let the first write the result."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    model = ModelConfig()
    counted: dict[str, Any] = {}
    for label in (*ENGINES, *GROWING, *COMPARISONS):
        engine = build(label, model, PROCESSES * ACCUMULATION, 1)
        tokens = torch.zeros(1, SEQUENCE + 1, dtype=torch.int64)
        for loops in (1, 1, *options.loops):  # the first two set things up
            batch = [MicroBatch(Batch(tokens), DepthPlan.constant(loops, 1)) for _ in range(ACCUMULATION)]
            counted.setdefault(label, {})[loops] = sum_by_kind(record_collectives(engine, batch))
    if dist.get_rank() == 0:
        parameters = RecurrentDepthTransformer(model).parameters()
        counted["parameters"] = sum(parameter.numel() for parameter in parameters)
        options.worker.write_text(json.dumps(counted))
    dist.barrier()
    leave_process(0)


def table(counted: dict[str, Any], loops: list[int]) -> str:
    """Markdown, one line per engine and values of T that send the same."""
    columns = {
        "gathers in forward": ["forward all-gather"],
        "gathers in backward": ["backward all-gather"],
        "gathers after the step": ["update all-gather"],
        "gradient reductions": ["backward all-reduce", "backward reduce-scatter"],
    }
    lines = [
        f"| Engine | T | {' | '.join(columns)} | other calls | MB in all |",
        f"|---|{'---:|' * (3 + len(columns))}",
    ]
    for label in (*ENGINES, *GROWING, *COMPARISONS):
        rows: dict[str, list[int]] = {}
        for t in loops:
            rows.setdefault(_cells(dict(counted[label][str(t)]), columns), []).append(t)
        lines += [f"| {label} | {', '.join(map(str, same))} | {cells} |" for cells, same in rows.items()]
    return "\n".join(lines).replace("| 0 (0.0 MB)", "| 0")


def _cells(row: dict[str, tuple[int, int]], columns: dict[str, list[str]]) -> str:
    total = sum(size for _, size in row.values()) / 1e6
    found = [[row.pop(kind, (0, 0)) for kind in kinds] for kinds in columns.values()] + [list(row.values())]
    cells = [f"{sum(number for number, _ in cell)} ({sum(size for _, size in cell) / 1e6:.1f} MB)" for cell in found]
    return f"{' | '.join(cells)} | {total:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 4, 16, 64], help="values of T")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counted.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}"]
        command += [f"--master-port={find_free_port()}", str(Path(__file__).resolve()), f"--worker={result}"]
        command += ["--loops", *map(str, options.loops)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        counted = json.loads(result.read_text())
    print(
        f"One optimizer step on {PROCESSES} processes, {ACCUMULATION} micro-batches each, {counted['parameters']:,} "
        f"parameters ({4 * counted['parameters'] / 1e6:.2f} MB): calls and megabytes.\n\n{table(counted, options.loops)}"
    )
    if options.out:
        options.out.write_text(json.dumps(counted, indent=2) + "\n")


if __name__ == "__main__":
    main()
