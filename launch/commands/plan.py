"""`rdt plan`: memory, communication, time and cost predicted from a config; --measure compares them with real steps."""

import functools
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.command_options import parse_run_options
from megatron_rdt.config import RunConfig, check_config, dump_config
from megatron_rdt.config.engines import PROPOSED
from megatron_rdt.devices import DEVICES, Device
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText, write_text
from megatron_rdt.output_paths import check_output_file
from megatron_rdt.untrusted_files import read_json

WORKER = Path(__file__).resolve().parent.parent / "plan_worker.py"
MEASURED_LOOPS = (1, 4, 16)
GB, MB, BILLION = 1e9, 1e6, 1e9
MOST_BILLIONS = 1e7
DESCRIPTION = "Parameters, memory, communication, time and cost of a run."


@dataclass(frozen=True)
class PlanOptions:
    """Options of `rdt plan` besides the run's config."""

    devices: int = 8
    """Number of devices, with one process each."""
    device: str = field(default="h100", metadata={"metavar": "NAME", "help": f"Kind of device: {', '.join(DEVICES)}."})
    """A key of `DEVICES`."""
    intra_bandwidth: float = 0.0
    """GB/s from a device to the others of its node, in one direction; 0: the device's own."""
    inter_bandwidth: float = 0.0
    """GB/s of a device's share of the network; 0: the device's own."""
    per_node: int = 0
    """Devices of a node; 0: the device's own."""
    utilisation: float = 0.0
    """Share of the peak FLOP rate that is reached while computing, where it was measured; 0: computed from the kernels of the step."""
    tokens: float = 100.0
    """Token budget, in billions."""
    price: float = 0.0
    """Price of a device for an hour; 0 omits the cost."""
    nproc: int = 0
    """--measure: processes on this machine; 0: 2, or 1 for engine single."""
    out: PathText = field(default="", metadata={"metavar": "FILE"})
    """Also write the numbers to this file, as JSON."""
    init: PathText = field(default="none", metadata={"metavar": "none|PATH"})
    """Checkpoint, run or export that the run will take its weights from: check that they fit; the plan is the same."""
    measure: bool = False
    """Take steps of this model on this machine's CPUs at several T, and print their memory and communication beside the planned ones."""


def plan(words: list[str]) -> int:
    """Say what a run will need: memory, communication, time, cost."""
    config, options = parse_run_options("rdt plan", DESCRIPTION, PlanOptions, words)
    check_config(config)
    out = Path(os.path.expanduser(options.out)) if options.out else None
    if out is not None:
        check_plan_file(out)
    config, notes = fit_to_devices(config, 1 if options.measure else options.devices)
    device = _device_of(options)
    if not 0 <= options.utilisation <= 1:
        raise ConfigError(f"--utilisation is {options.utilisation}, it must be at least 0 and at most 1.")
    if min(options.tokens, options.price, options.nproc) < 0:
        raise ConfigError("--tokens, --price and --nproc must not be negative.")
    if options.tokens > MOST_BILLIONS:
        raise ConfigError(f"--tokens is {options.tokens:g} billion; it counts billions: 20 means 20,000,000,000.")
    if options.init != "none":
        notes += _check_init(config, options.init)
    data: Any
    if options.measure:
        text, data = compare_with_measurement(config, options.nproc)
    else:
        from megatron_rdt.planner.plan_report import format_plan, plan_to_dict
        from megatron_rdt.planner.run_plan import make_plan

        made = make_plan(config, options.devices, device, options.utilisation)
        text, data = (
            format_plan(made, options.utilisation, options.tokens * BILLION, options.price),
            plan_to_dict(made, options.tokens * BILLION),
        )
    print("\n".join([*notes, text]))
    if out is not None:
        write_text(out, json.dumps(data, indent=2) + "\n")
    return EXIT_OK


def check_plan_file(file: Path) -> None:
    """Refuse a file that cannot be written, or that holds anything but an earlier plan, with a ConfigError."""
    check_output_file(file)
    if not file.exists() or not file.stat().st_size:
        return
    try:
        document = read_json(file)
    except (OSError, ValueError):
        document = None
    # The numbers of a plan, or the rows of --measure.
    first = document[0] if isinstance(document, list) and document else document
    if not isinstance(first, dict) or not (
        {"planned", "loops"} <= first.keys() or {"layout", "memory"} <= first.keys()
    ):
        raise ConfigError(
            f"--out {file} exists and is not a plan of `rdt plan`; it is kept as it is. Choose another --out."
        )


def fit_to_devices(config: RunConfig, devices: int) -> tuple[RunConfig, list[str]]:
    """Give a config for one process an engine and batch sizes for `devices`; return it and a sentence per change.

    Presets are for one process: they get the engine for many, and a batch that the devices divide.
    """
    notes = []
    if devices > 1 and not config.parallel.engine_kind.many_processes:
        notes.append(
            f"parallel.engine is {config.parallel.engine}, for one process; {devices} are planned with {PROPOSED}."
        )
        config = replace(config, parallel=replace(config.parallel, engine=PROPOSED))
        data_ranks = max(devices // (config.parallel.context * config.parallel.tensor), 1)
        # A smaller micro-batch keeps the global batches near those asked for, on which the learning rate depends.
        batches = config.train.batches
        micro = min(config.train.micro_batch, max(min(batches.sizes) // data_ranks, 1))
        schedule, batch = [], 0
        for piece in batches.pieces:
            batch = -(-piece.batch // (data_ranks * micro)) * data_ranks * micro
            schedule.append(f"{piece.step}:{batch}")
        schedule = schedule if config.train.batch_schedule else []
        train = replace(config.train, micro_batch=micro, global_batch=batch, batch_schedule=schedule)
        for name in ("micro_batch", "global_batch", "batch_schedule"):
            given, planned = getattr(config.train, name), getattr(train, name)
            if planned != given:
                notes.append(
                    f"train.{name} is {given}; planned with {planned}, so that {devices} devices divide the batch."
                )
        config = replace(config, train=train)
    return config, notes


def _check_init(config: RunConfig, init: str) -> list[str]:
    """Return lines on a run that takes its weights from `init`; CheckpointError if they are of another model."""
    from megatron_rdt.checkpoint import resolve_init, verify
    from megatron_rdt.train.initial_weights import describe_start

    return describe_start(resolve_init(init, functools.partial(verify, hashes=False)), config)


def _device_of(options: PlanOptions) -> Device:
    """Return the device that --device names, with bandwidths and node size as given; ConfigError if wrong."""
    if options.device not in DEVICES:
        raise ConfigError(f"--device is {options.device}, it must be one of {', '.join(DEVICES)}.")
    device = DEVICES[options.device]
    for name in ("intra_bandwidth", "inter_bandwidth", "per_node"):
        value = getattr(options, name)
        if value < 0:
            raise ConfigError(f"--{name} is {value}, it must be above 0, or 0 for the device's own.")
        if value:
            device = replace(device, **{name: value if name == "per_node" else value * GB})
    return device


def compare_with_measurement(config: RunConfig, processes: int) -> tuple[str, list[dict[str, Any]]]:
    """Take steps on CPU processes; return measured and planned memory and collectives, as text and a dict per T."""
    from launch.local_processes import count_processes, run_processes
    from megatron_rdt.config.layout import Layout
    from megatron_rdt.planner.communication import step_communication, sum_by_kind
    from megatron_rdt.planner.memory import StepDepth, step_memory

    processes = processes or count_processes(config)
    config = replace(config, train=replace(config.train, device="cpu"))
    check_config(config, processes)
    with tempfile.TemporaryDirectory(prefix="rdt-plan-") as folder:
        yaml, out = Path(folder) / "config.yaml", Path(folder) / "measured.json"
        write_text(yaml, dump_config(config))
        loops = [*map(str, MEASURED_LOOPS)]
        run_processes(
            ["--config", str(yaml), "--out", str(out), "--loops", *loops], processes, script=WORKER, is_run=False
        )
        rows = json.loads(out.read_text(encoding="utf-8"))
    layout = Layout.of(config.parallel, processes)
    k = None if config.depth.backprop == "all" else int(config.depth.backprop)
    lines = [f"One step on {processes} CPU processes, counted on the first and planned"]
    for row in rows:
        depth = StepDepth(row["loops"], min(row["loops"], k or row["loops"]))
        memory = step_memory(config, layout, False, depth)
        sent = sum_by_kind(step_communication(config, layout, depth, gpu=False))
        row["planned"] = {"peak": memory.peak, "sent": sent}
        lines.append(
            f"T = {row['loops']}: peak memory {row['peak'] / MB:,.1f} MB measured, {memory.peak / MB:,.1f} MB planned "
            f"({100 * (memory.peak / row['peak'] - 1):+.1f} %; {memory.moment})"
        )
        for key in sorted({*row["sent"], *sent}):
            (calls, size), (planned, expected) = row["sent"].get(key, (0, 0)), sent.get(key, (0, 0))
            lines.append(f"  {key:<24} {calls:>6} calls {size:>14,} bytes; planned {planned:>6} {expected:>14,}")
    return "\n".join(lines), rows
