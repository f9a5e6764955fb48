"""Start of one rank among thousands: seconds and memory until the model is built, sharded and has its initial weights.

The rank is this process, in a process group of the fake backend: the other ranks do not exist, and collectives return at
once. All else is a run's own code, with CPU tensors, but for the hosts' groups (docs/SCALE.md). "build" makes the model on
the meta device, "mesh" the groups of ranks, "shard" FSDP2's shards and the optimizers, "fill" the initial weights of the
rank's shard: seconds of CPU time, one thread. "adds" is the peak of resident memory over what it was after the imports. A
shard of more than --write-gb is allocated, which takes no memory, and written only up to there; "written" says how much.

    python benchmarks/startup.py                                       # a table of all presets on 16,384 ranks
    python benchmarks/startup.py --preset openmythos_1t --json
    python benchmarks/startup.py --preset openmythos_1t --world 4096 --rank 7 --set parallel.expert=64
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tools.fake_group import join_fake_group
from tools.options import MODELS, PRESETS, make_preset_parser
from tools.processes import run_fresh
from tools.resident_memory import measure_growth
from tools.tables import format_header, format_row

from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.model import Block, RecurrentDepthTransformer, draw_initial_values
from megatron_rdt.parallel import fsdp, make_engine

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters, 10^9": lambda row: f"{row['parameters'] / 1e9:,.2f}",
    **{
        f"{stage} s": lambda row, stage=stage: f"{row['seconds'][stage]:.1f}"
        for stage in ("build", "mesh", "shard", "fill")
    },
    "all s": lambda row: f"{sum(row['seconds'].values()):.1f}",
    "own shard MB": lambda row: f"{row['shard_bytes'] / 1e6:,.1f}",
    "adds MB": lambda row: f"{row['added_bytes'] / 1e6:,.0f}",
    "written": lambda row: f"{row['written_bytes'] / row['shard_bytes']:.0%}",
}


def load_preset(preset: str, world: int, settings: Sequence[str]) -> RunConfig:
    """Load a preset for FSDP2 on the CPU with the keys of --set, and one sequence per data-parallel rank and step."""
    words = ["parallel.engine=fsdp", "train.device=cpu", "train.micro_batch=1", *settings]
    data = Layout.of(load_config(MODELS / f"{preset}.yaml", words).parallel, world).data
    return load_config(MODELS / f"{preset}.yaml", [*words, f"train.global_batch={data}"])


def count_parameters(preset: str) -> int:
    """Return the number of parameters of a preset."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(load_config(MODELS / f"{preset}.yaml").model)
    return sum(parameter.numel() for parameter in model.parameters())


class Start:
    """The start of one rank.

    Args:
        config: of the run.
        most_bytes: of the shard that are written.

    Attributes:
        seconds: of CPU time, by stage; nothing waits, so an idle machine takes as long.
        parameters: of the whole model.
        shard_bytes, written_bytes: of this rank's parameters, and of those that were written.
    """

    def __init__(self, config: RunConfig, most_bytes: float) -> None:
        self.config, self.most_bytes = config, most_bytes
        self.seconds = dict.fromkeys(("build", "mesh", "shard", "fill"), 0.0)
        self.parameters = self.shard_bytes = self.written_bytes = 0

    @contextmanager
    def _time(self, stage: str, inside: str = "") -> Iterator[None]:
        """Add the CPU seconds of the block to a stage, and take them from the one that it is `inside`."""
        begun = time.process_time()
        yield
        passed = time.process_time() - begun
        self.seconds[stage] += passed
        if inside:
            self.seconds[inside] -= passed

    def run(self) -> None:
        """Build, shard and fill the model as the trainer does."""
        make_meshes = fsdp.make_meshes

        def make_timed_meshes(*args: Any) -> Any:
            with self._time("mesh", inside="shard"):
                return make_meshes(*args)

        with self._time("mesh"):
            engine = make_engine(self.config, torch.device("cpu"))
        with self._time("build"), torch.device("meta"):
            model = RecurrentDepthTransformer(self.config.model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        draw = draw_initial_values(model, self.config.run.seed)

        def fill(name: str, shape: torch.Size, blocks: Sequence[Block]) -> None:
            size = sum(values.numel() * values.element_size() for values, _ in blocks)
            self.shard_bytes += size
            if self.shard_bytes <= self.most_bytes:
                with self._time("fill", inside="shard"):
                    draw(name, shape, blocks)
                self.written_bytes += size

        with self._time("shard"), patch.object(fsdp, "make_meshes", make_timed_meshes):
            engine.setup(model, fill)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start one rank in this process; return what it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = Start(load_preset(options.preset, options.world, options.set), options.write_gb * 1e9)
    with join_fake_group(options.rank, options.world):
        added = measure_growth(start.run)
    return {
        "preset": options.preset,
        "world": options.world,
        "rank": options.rank,
        "settings": options.set,
        "parameters": start.parameters,
        "seconds": start.seconds,
        "shard_bytes": start.shard_bytes,
        "written_bytes": start.written_bytes,
        "added_bytes": added,
    }


def main() -> None:
    """Print one preset's numbers, or a table of all presets."""
    parser = make_preset_parser(__doc__)
    parser.add_argument("--rank", type=int, default=0, help="number of the rank that starts")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of the config")
    parser.add_argument("--write-gb", type=float, default=6.0, help="write shards up to this size")
    options = parser.parse_args()
    if options.preset and options.json:
        print(json.dumps(measure(options)))
        return
    words = ["--world", str(options.world), "--rank", str(options.rank), "--write-gb", str(options.write_gb), "--json"]
    presets = [options.preset] if options.preset else sorted(PRESETS, key=count_parameters)
    if not options.json:
        print(format_header(["preset", *COLUMNS], left=1), flush=True)
    for preset in presets:
        row = run_fresh(__file__, "--preset", preset, *words, "--set", *options.set)
        line = format_row([f"`{preset}`", *(column(row) for column in COLUMNS.values())])
        print(json.dumps(row) if options.json else line, flush=True)


if __name__ == "__main__":
    main()
