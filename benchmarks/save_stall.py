"""Time that training waits for a save, with and without `checkpoint.asynchronous`, under FSDP2 and ZeRO on two processes.

A model is saved several times in each way, the two in turn; of each rank the longer time counts, and the fastest round.
"Waits" is what training waits for: the whole save, or the copy into host memory. "Whole" is the time until the checkpoint
has its name, during which the other way trains: the steps that ended meanwhile, the last one after it, are counted. Times are
wall time.

    python benchmarks/save_stall.py [--dim 256] [--rounds 3] [--engines fsdp zero1 zero3] [--out FILE.json]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tools.options import make_parser, repeat_options, write_numbers
from tools.processes import run_ranks
from tools.tables import format_header, format_row

from megatron_rdt.checkpoint import BackgroundSave, stage_checkpoint
from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.environment import leave_process, quiet_libraries
from megatron_rdt.object_collectives import gather_objects
from megatron_rdt.parallel import Engine, MicroBatch, build_engine

WAYS = ("waits", "asynchronous")
SEQUENCE, VOCABULARY = 64, 16384


def take_step(engine: Engine) -> None:
    """Train on one random sequence."""
    batch = Batch(torch.randint(VOCABULARY, (1, SEQUENCE + 1)))
    engine.forward_backward([MicroBatch(batch, DepthPlan((2,), 2))])
    engine.step(1e-3)


def save(engine: Engine, run: Path, step: int, way: str) -> dict[str, float]:
    """Save; return the seconds that training waits, those until the checkpoint is complete, and the steps meanwhile."""
    dist.barrier()
    began, steps = time.perf_counter(), 0
    finish = stage_checkpoint(engine, run, "{}", {"step": step}, {}, None, keep=1, copy=way == "asynchronous")
    if way == "waits":
        finish()
        waited = time.perf_counter() - began
    else:
        background = BackgroundSave(finish)
        waited = time.perf_counter() - began
        while not all(gather_objects(background.has_ended())):  # as many steps on each rank
            take_step(engine)
            steps += 1
        background.wait()
        return {"waits": waited, "whole": waited + background.seconds, "steps": steps}
    return {"waits": waited, "whole": waited, "steps": steps}


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the times of one engine on this rank's run."""
    dist.init_process_group("gloo")
    model = ModelConfig(vocab_size=VOCABULARY, dim=options.dim, core_layers=4, heads=8, kv_heads=8)
    train = TrainConfig(device="cpu", global_batch=2, micro_batch=1, sequence_length=SEQUENCE)
    engine = build_engine(
        RunConfig(model=model, train=train, parallel=ParallelConfig(engine=name)), torch.device("cpu")
    )
    take_step(engine)
    found: dict[str, Any] = {way: [] for way in WAYS}
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    run = Path(folder[0])
    for step in range(1, options.rounds + 2):
        for number, way in enumerate(WAYS):
            of_ranks = gather_objects(save(engine, run, 2 * step + number, way))
            if step > 1:  # the first round allocates memory and imports
                found[way].append({key: max(each[key] for each in of_ranks) for key in of_ranks[0]})
    began = time.perf_counter()
    take_step(engine)
    found["step"] = time.perf_counter() - began
    files = (run / "checkpoints").rglob("*")
    found["bytes"] = sum(path.stat().st_size for path in files if path.is_file())
    return found


def main() -> None:
    """Print a line per engine; with --worker, measure one engine as one of its ranks."""
    parser = make_parser(__doc__, dim=256, rounds=3, out=None)
    parser.add_argument("--engines", nargs="+", default=["fsdp", "zero1", "zero3"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        quiet_libraries(2)
        torch.set_num_threads(1)
        found = measure(options, options.engines[0])
        if dist.get_rank() == 0:
            options.worker.write_text(json.dumps(found))
        leave_process(0)
    print(
        format_header(
            [
                "engine",
                "checkpoint, MB",
                "waits, s",
                "asynchronous: waits, s",
                "whole, s",
                "steps meanwhile",
                "a step, s",
            ],
            left=1,
        )
    )
    numbers = {}
    for name in options.engines:
        words = ["--engines", name, *repeat_options(options, ("dim", "rounds"))]
        found = numbers[name] = run_ranks(__file__, 2, *words)
        fastest = {way: min(found[way], key=lambda times: times["waits"]) for way in WAYS}
        other = fastest["asynchronous"]
        cells = [f"{found['bytes'] / 1e6:.0f}", f"{fastest['waits']['waits']:.2f}", f"{other['waits']:.2f}"]
        print(format_row([name, *cells, f"{other['whole']:.2f}", other["steps"], f"{found['step']:.2f}"]), flush=True)
    write_numbers(options, {"engines": numbers})


if __name__ == "__main__":
    main()
