"""What every engine sends over the network in one optimizer step, against T.

Two processes on this machine, two micro-batches per process and step. The last two engines are there for comparison:
wrappings that do not know of the loop, and gather the core again at every iteration.

    python benchmarks/collectives.py [--loops 1 4 16] [--out FILE.json]
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from launch.local import free_port
from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.environment import leave_process
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, MicroBatch, make_engine
from megatron_rdt.parallel.counting import count_step, totals
from megatron_rdt.parallel.fsdp import FullyShardedEngine

PROCESSES, ACCUMULATION, SEQUENCE = 2, 2, 16
# Name of the engine, then what is special about it.
ENGINES = ["ddp", "fsdp", "fsdp kept-gathered", "zero1", "zero2", "zero3"]
COMPARISONS = ["fsdp layer-units", "zero3 no-leaf-modules"]


class LayerUnitsEngine(FullyShardedEngine):
    """The wrapping that one would write without knowing of the loop: every layer its own unit, the core none."""

    def setup(self, model: RecurrentDepthTransformer) -> None:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for unit in (*model.prelude, *model.core.layers, *model.coda):
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=self.device)
        self._fill(model)
        self.configure(model)
        self.make_optimizer(model)
        self.module = model  # type: ignore[assignment]


@contextlib.contextmanager
def without_leaf_modules() -> Any:
    """ZeRO-3 as it is when nobody tells it which module owns the loop."""
    from megatron_rdt.parallel.zero import import_deepspeed

    utilities = import_deepspeed().utils
    mark, utilities.set_z3_leaf_modules = utilities.set_z3_leaf_modules, lambda *_: None
    yield
    utilities.set_z3_leaf_modules = mark


def build(label: str, model_config: ModelConfig, global_batch: int, micro_batch: int) -> Engine:
    """The engine of a label out of ENGINES or COMPARISONS, or "single", on the CPU."""
    name, _, variant = label.partition(" ")
    config = RunConfig(
        model=model_config,
        train=TrainConfig(global_batch=global_batch, micro_batch=micro_batch, device="cpu"),
        parallel=ParallelConfig(engine=name, reshard_after_forward=variant != "kept-gathered"),  # type: ignore[arg-type]
    )
    cpu = torch.device("cpu")
    engine = LayerUnitsEngine(config, cpu) if variant == "layer-units" else make_engine(config, cpu)
    if name == "single":  # alone, also inside a process group
        engine.rank, engine.world_size = 0, 1
    with torch.device("meta"):
        model = RecurrentDepthTransformer(model_config)
    with without_leaf_modules() if variant == "no-leaf-modules" else contextlib.nullcontext():
        engine.setup(model)
    return engine


def work(options: argparse.Namespace) -> None:
    """One of the processes: count, and let the first write the result."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    model = ModelConfig()
    counted: dict[str, Any] = {}
    for label in ENGINES + COMPARISONS:
        engine = build(label, model, PROCESSES * ACCUMULATION, 1)
        tokens = torch.zeros(1, SEQUENCE + 1, dtype=torch.int64)
        for loops in (1, 1, *options.loops):  # the first two set things up
            batch = [MicroBatch(tokens, DepthPlan.constant(loops, 1)) for _ in range(ACCUMULATION)]
            counted.setdefault(label, {})[loops] = totals(count_step(engine, batch))
    if dist.get_rank() == 0:
        parameters = RecurrentDepthTransformer(model).parameters()
        counted["parameters"] = sum(parameter.numel() for parameter in parameters)
        options.worker.write_text(json.dumps(counted))
    dist.barrier()
    leave_process(0)


def table(counted: dict[str, Any], loops: list[int]) -> str:
    """Markdown, one line per engine and T. Reductions outside the backward pass are of losses and norms, a few bytes."""
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
    for label in ENGINES + COMPARISONS:
        for t in loops:
            row = dict(counted[label][str(t)])
            total = sum(size for _, size in row.values()) / 1e6
            found = [[row.pop(kind, (0, 0)) for kind in kinds] for kinds in columns.values()]
            cells = [
                f"{sum(number for number, _ in cell)} ({sum(size for _, size in cell) / 1e6:.1f} MB)" for cell in found
            ]
            others = sum(number for number, _ in row.values())
            lines.append(f"| {label} | {t} | {' | '.join(cells)} | {others} | {total:.1f} |")
    return "\n".join(lines).replace("| 0 (0.0 MB)", "| 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 4, 16], help="values of T")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counted.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}"]
        command += [f"--master-port={free_port()}", str(Path(__file__).resolve()), f"--worker={result}"]
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
