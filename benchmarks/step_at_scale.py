"""A training step of one rank among thousands: what it sends, and its peak memory against the plan.

The rank is this process, in a process group of the fake backend, with fake tensors: FSDP2, tensor, context and expert
parallelism run a run's own code for the preset's fastest plan on the smallest GPUs of DEVICES_TRIED where one fits, and
nothing is computed or sent.
"Sent" is the larger buffer of each collective of a whole optimizer step, summed; "peak" all tensors that exist at a time,
and "planned" what the planner says for the kernels of a CPU, which run here; "s" how long this takes here. Every expert gets
an equal share of the tokens.

    python benchmarks/step_at_scale.py                        # a table of all presets on 16,384 ranks
    python benchmarks/step_at_scale.py --preset openmythos_1t --json
"""

import argparse
import json
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from tools.fake_group import join_fake_group
from tools.live_memory import LiveMemory
from tools.options import MODELS, PRESETS, make_preset_parser
from tools.preset_plans import plan_preset
from tools.processes import run_fresh
from tools.tables import format_header, format_row
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.devices import DEVICES
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.moe import MixtureOfExperts, RunExperts
from megatron_rdt.parallel import MicroBatch, expert_parallel, fsdp, make_engine
from megatron_rdt.parallel.autograd_collectives import all_to_all
from megatron_rdt.parallel.collective_counter import record_collectives, sum_by_kind
from megatron_rdt.planner.memory import StepDepth, step_memory
from megatron_rdt.planner.run_plan import plan_depths

# The last one does not exist: with so much memory, every preset fits.
ROOMY = replace(DEVICES["b200"], name="B200, 288 GB", memory=288e9)
DEVICES_TRIED = (DEVICES["h100"], DEVICES["h200"], DEVICES["b200"], ROOMY)
COLUMNS = [
    "preset",
    "planned for",
    "replicate x shard x context x tensor, expert",
    "T, k",
    "collectives",
    "sent GB",
    "peak GB",
    "planned GB",
    "s",
]


class EvenExchange(expert_parallel.ExpertExchange):
    """The exchange of experts' rows where each rank sends as many to every other: fake tensors hold no counts to read."""

    def __call__(self, run: RunExperts, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Send rows to their experts' ranks; return the outputs in the same order."""
        ranks = self.group.size()
        shares = [len(rows) // ranks + (rank < len(rows) % ranks) for rank in range(ranks)]
        counts = torch.empty_like(ends)
        torch.distributed.all_to_all_single(torch.empty_like(counts), counts, group=self.group)
        here = all_to_all(rows, shares, shares, self.group)
        order = torch.arange(len(here), device=rows.device)
        outputs = run(expert_parallel.scatter_rows(here, order), ends[: len(ends) // ranks])
        return all_to_all(expert_parallel.scatter_rows(outputs, order), shares, shares, self.group)


def patch_for_fakes() -> ExitStack:
    """Make groups and cut parameters outside of the fake tensors; let experts run as on a GPU, where no count is read."""

    def leave_fakes(function: Any) -> Any:
        def run(*args: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args)

        return run

    def run_grouped(mixture: MixtureOfExperts, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return mixture._run_experts_grouped(rows, ends.int())

    stack, engine = ExitStack(), fsdp.FullyShardedEngine
    stack.enter_context(patch.object(fsdp, "make_meshes", leave_fakes(fsdp.make_meshes)))
    stack.enter_context(patch.object(engine, "_apply_fsdp", leave_fakes(engine._apply_fsdp)))
    stack.enter_context(patch.object(expert_parallel, "ExpertExchange", EvenExchange))
    stack.enter_context(patch.object(MixtureOfExperts, "_run_sorted_rows", run_grouped))
    return stack


def take_steps(config: RunConfig, world: int, depth: StepDepth) -> dict[str, Any]:
    """Take two steps as rank 0; return seconds, collectives and memory of the second, which has its moments already."""
    layout = Layout.of(config.parallel, world)
    sequences, length = config.train.micro_batch, config.train.sequence_length
    number = config.train.global_batch // (layout.data * sequences)
    plan = DepthPlan((depth.loops,) * sequences, depth.with_grad, tuple(range(1, sequences + 1)))
    with join_fake_group(0, world), patch_for_fakes():
        engine = make_engine(config, torch.device("cpu"))
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
            engine.setup(model, lambda name, shape, blocks: None)
            weights = memory.total
            for _ in range(2):
                memory.peak = memory.total
                began = time.perf_counter()
                ids = torch.zeros(sequences, length + 1, dtype=torch.int64)
                calls = record_collectives(engine, [MicroBatch(Batch(ids), plan)] * number)
                seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "sent": sum_by_kind(calls),
        "weights": weights,
        "peak": memory.peak,
        "micro_batches": number,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Plan a preset, take the plan's step in this process, and return both."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = MODELS / f"{options.preset}.yaml"
    plans = (plan_preset(path, options.world, device) for device in DEVICES_TRIED)
    plan = next((plan for plan in plans if plan is not None), None)
    if plan is None:
        names = ", ".join(device.name for device in DEVICES_TRIED)
        raise SystemExit(f"{options.preset} fits on no arrangement of {options.world} of {names}")
    train = replace(plan.config.train, compile="none", device="cpu")
    config = replace(plan.config, train=train)
    loops, with_grad, _ = plan_depths(config.depth)
    depth = StepDepth(round(loops), min(round(with_grad), round(loops)))
    layout = plan.layout
    found = take_steps(config, options.world, depth)
    return {
        "preset": options.preset,
        "world": options.world,
        "kind": plan.device.name,
        "axes": f"{layout.replicate} x {layout.shard} x {layout.context} x {layout.tensor}, {layout.expert}",
        "loops": depth.loops,
        "with_grad": depth.with_grad,
        **found,
        "planned": step_memory(config, layout, False, depth).peak,
        "planned_on_gpu": plan.memory.peak,
    }


def main() -> None:
    """Print one preset's numbers, or a table of all presets."""
    parser = make_preset_parser(__doc__)
    options = parser.parse_args()
    if options.preset and options.json:
        print(json.dumps(measure(options)))
        return
    presets = [options.preset] if options.preset else PRESETS
    print(format_header(COLUMNS, left=3))
    rows = []
    for name in presets:
        rows.append(run_fresh(__file__, "--preset", name, "--world", str(options.world), "--json"))
        row = rows[-1]
        calls, sent = (sum(each[part] for each in row["sent"].values()) for part in (0, 1))
        sizes = [f"{number / 1e9:.2f}" for number in (sent, row["peak"], row["planned"])]
        depth = f"{row['loops']}, {row['with_grad']}"
        print(
            format_row([f"`{name}`", row["kind"], row["axes"], depth, calls, *sizes, f"{row['seconds']:.0f}"]),
            flush=True,
        )


if __name__ == "__main__":
    main()
