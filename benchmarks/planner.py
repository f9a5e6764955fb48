"""How far what `rdt plan` says of memory is from what steps really allocate.

A grid of small models on the CPU, in one process and under FSDP2 on two: feed-forward dense or a mixture of experts,
attention gqa or mla, products in float32 or bfloat16, everything kept, per-iteration checkpoints, or gradient through the
last 2 iterations with two micro-batches. Compared are the peaks of what the allocator handed out during a step; for a few
cases also the growth of resident memory in a process of its own, which holds what the C library and gloo keep, too.

    python benchmarks/planner.py [--loops 1 4 16] [--out FILE.json]
    python benchmarks/planner.py --presets      # writes the last table of RESULTS.md
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from launch.local_processes import find_free_port
from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import DEVICES
from megatron_rdt.environment import leave_process, quiet_libraries

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE, BATCH = 128, 2
MODEL = ModelConfig(dim=256, ffn_dim=512)
ATTENTION: dict[str, dict[str, Any]] = {"gqa": {}, "mla": {"attention": "mla", "query_rank": 64}}
FEEDFORWARD: dict[str, dict[str, Any]] = {"dense": {}, "moe": {"core_ffn": "moe"}}
# name -> checkpointing, k, micro-batches per step
MODES: dict[str, tuple[str, Any, int]] = {
    "all kept": ("none", "all", 1),
    "per_iteration": ("per_iteration", "all", 1),
    "last 2, 2 micro-batches": ("none", 2, 2),
}
RESIDENT = ("gqa dense float32 all kept", "gqa moe float32 all kept", "mla dense bfloat16 per_iteration")
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
DEVICE_COUNTS = (8, 64, 512, 4096, 16384)
SMALL_STEP, LARGE_STEP, UTILISATION = 4 * 2**20, 16 * 2**20, 0.4


def cases(processes: int) -> dict[str, RunConfig]:
    """The grid, by name."""
    found = {}
    for attention, ffn, precision, mode in product(ATTENTION, FEEDFORWARD, ("float32", "bfloat16"), MODES):
        checkpoint, k, number = MODES[mode]
        batch = BATCH if precision == "float32" else 2 * BATCH
        found[f"{attention} {ffn} {precision} {mode}"] = RunConfig(
            model=replace(MODEL, **ATTENTION[attention], **FEEDFORWARD[ffn]),
            depth=DepthConfig(checkpoint=checkpoint, backprop=k),  # type: ignore[arg-type]
            train=TrainConfig(
                micro_batch=batch,
                global_batch=batch * number * processes,
                sequence_length=SEQUENCE,
                precision=precision,  # type: ignore[arg-type]
                device="cpu",
            ),
            parallel=ParallelConfig(engine="single" if processes == 1 else "fsdp"),
        )
    return found


def planned(config: RunConfig, processes: int, loops: int) -> float:
    """Bytes that the planner says."""
    from megatron_rdt.planner.memory import Depth, step_memory

    k = loops if config.depth.backprop == "all" else int(config.depth.backprop)
    return step_memory(config, Layout.of(config.parallel, processes), False, Depth(loops, min(k, loops))).peak


def work(options: argparse.Namespace) -> None:
    """One of the processes of the grid."""
    import torch

    from megatron_rdt.environment import read_process_info
    from megatron_rdt.parallel.process_group import join_process_group
    from megatron_rdt.planner.measure import measure_steps

    process, rows, joined = read_process_info(), [], False
    torch.manual_seed(process.rank)
    for name, config in cases(process.world_size).items():
        device = torch.device("cpu") if joined else join_process_group(config, process)
        joined = True
        for each in measure_steps(config, device, options.loops):
            plan = planned(config, process.world_size, each.loops)
            rows.append({"case": name, "loops": each.loops, "measured": each.peak, "planned": plan})
    if process.rank == 0:
        options.worker.write_text(json.dumps(rows))


def resident(name: str, loops: int) -> None:
    """Print the growth of this process's resident memory over two steps of a case, after a small model has run."""
    import torch

    from megatron_rdt.planner.measure import build_engine, take_step

    config = cases(1)[name]
    small = replace(
        config, model=replace(config.model, dim=16, heads=2, vocab_size=32), depth=DepthConfig(mean=1, max=1)
    )
    take_step(build_engine(small, torch.device("cpu")), 1)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size is noted anew
    before = status("VmRSS")
    engine = build_engine(config, torch.device("cpu"))
    for _ in range(2):
        take_step(engine, loops)
    print(json.dumps(status("VmHWM") - before))


def status(field: str) -> int:
    """Bytes of a line of this process's status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(processes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid on that many processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += [
            f"--master-port={find_free_port()}",
            __file__,
            f"--worker={result}",
            "--loops",
            *map(str, options.loops),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        return json.loads(result.read_text())


def table(rows: list[dict[str, Any]], loops: list[int]) -> str:
    """Markdown: a line per case; measured megabytes and the planner's error at each T."""
    header = ["case", *(f"T = {t}: MB | error" for t in loops)]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (2 * len(loops))}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [
            f"{row['measured'] / 1e6:.1f} | {100 * (row['planned'] / row['measured'] - 1):+.1f} %"
            for row in rows
            if row["case"] == case
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def grid(options: argparse.Namespace) -> None:
    """Measure and print."""
    found: dict[str, Any] = {}
    for processes in (1, 2):
        rows = found[str(processes)] = run(processes, options)
        errors = [abs(row["planned"] / row["measured"] - 1) for row in rows]
        engine = "one process" if processes == 1 else "fsdp on 2 processes"
        print(
            f"{engine}: error at most {100 * max(errors):.1f} %, median {100 * median(errors):.1f} %, "
            f"{len(rows)} steps\n\n{table(rows, options.loops)}\n"
        )
    print("| case, T = 4 | planned MB | resident MB | error |\n|---|---:|---:|---:|")
    for name in RESIDENT:
        command = [sys.executable, __file__, "--resident", name]
        environment = os.environ | RETURN_FREED_BLOCKS
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
        size, plan = json.loads(done.stdout.splitlines()[-1]), planned(cases(1)[name], 1, 4)
        found.setdefault("resident", {})[name] = {"resident": size, "planned": plan}
        print(f"| {name} | {plan / 1e6:.1f} | {size / 1e6:.1f} | {100 * (plan / size - 1):+.1f} % |")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


PRESET_COLUMNS = (
    "preset, tokens per sequence | H100 | step, tokens | replicate x shard x context x tensor, expert | micro-batch | "
    "checkpoint, core_gather, reduce | GB | step, s | MFU bound"
)
PRESET_HEADER = f"| {PRESET_COLUMNS} |\n|---|---:|---:|---|---:|---|---:|---:|---:|"


def preset_rows(path: Path) -> str:
    """Plan one preset; return a Markdown row per number of devices."""
    from megatron_rdt.planner.search import fastest

    device, sequence = DEVICES["h100"], load_config(path).train.sequence_length
    lines, name = [], f"{path.stem}, {sequence:,}"
    for devices in DEVICE_COUNTS:
        tokens = SMALL_STEP if devices <= 512 else LARGE_STEP
        options = {"sequence_length": sequence, "global_batch": tokens // sequence, "precision": "bfloat16"}
        # AdamW for all: Muon is refused with tensor parallelism, which the search tries.
        fixed = {"train": options, "optimizer.name": "adamw"}
        config = load_config(path, fixed | ({"depth.per": "step"} if "huginn" in path.stem else {}))
        plan = fastest(config, devices, device, UTILISATION)
        begin, name = f"| {name} | {devices:,} | {tokens / 2**20:.0f}M |", ""
        if plan is None or plan.time is None:
            lines.append(f"{begin} nothing fits | | | | | |")
            continue
        layout, run, time = plan.layout, plan.config, plan.time
        axes = f"{layout.replicate} x {layout.shard} x {layout.context} x {layout.tensor}, {layout.expert}"
        ways = f"{run.depth.checkpoint}, {run.parallel.core_gather}, {run.parallel.reduce}"
        lines.append(
            f"{begin} {axes} | {run.train.micro_batch} | {ways} "
            f"| {plan.memory.peak / 1e9:.1f} | {time.expected:.3g} | {100 * time.mfu_bound:.0f} % |"
        )
    return "\n".join(lines)


def presets() -> None:
    """Plan every preset and write the table to the end of benchmarks/RESULTS.md."""
    page = ROOT / "benchmarks" / "RESULTS.md"
    text, mark = page.read_text(encoding="utf-8"), "<!-- made by benchmarks/planner.py --presets -->"
    rows = [PRESET_HEADER]
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml")):
        rows.append(preset_rows(path))
        print(rows[-1], flush=True)
    page.write_text(text[: text.index(mark) + len(mark)] + "\n\n" + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 4, 16], help="values of T")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--presets", action="store_true", help="write the last table of benchmarks/RESULTS.md instead")
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    parser.add_argument("--resident", metavar="CASE", help="print the growth of resident memory of one case")
    options = parser.parse_args()
    quiet_libraries(1)
    if options.worker:
        work(options)
        leave_process(0)
    elif options.resident:
        resident(options.resident, 4)
    elif options.presets:
        presets()
    else:
        grid(options)


if __name__ == "__main__":
    main()
