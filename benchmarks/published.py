"""Throughput that others have published for models of this kind, beside the plan for their machines.

Computed, not measured here: `step_time` of the planner, with the model, batch, checkpoints and arrangement that each source
names. The engine is the nearest of ours.

    python benchmarks/published.py [--out FILE.json]
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

from tools.options import MODELS, make_parser, write_numbers
from tools.tables import format_header, format_row

from megatron_rdt.config import load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import DEVICES
from megatron_rdt.planner.run_plan import plan_depths
from megatron_rdt.planner.step_time import step_time


@dataclass(frozen=True)
class Published:
    """One published throughput.

    Attributes:
        words: what was run.
        source: where the figure stands.
        preset: the model.
        device, devices: kind and number of devices.
        tokens_per_second: of one device, the least and the most that are published.
        settings: keys of the config that differ from the preset's.
    """

    words: str
    source: str
    preset: str
    device: str
    devices: int
    tokens_per_second: tuple[float, float]
    settings: dict[str, Any] = field(default_factory=dict)


# Huginn: 212 and 262 PFLOP/s of all 4,096 devices were 1.0 and 1.2 million tokens per second, so 215 GFLOP per token by the
# authors' count. Everybody ran the same T, iterations were checkpointed, and the code was compiled.
HUGINN_FLOPS = (212e15 / 1.0e6 + 262e15 / 1.2e6) / 2
HUGINN = {
    "optimizer.name": "adamw",
    "parallel.engine": "ddp",
    "depth.per": "accumulation_step",
    "depth.checkpoint": "per_iteration",
    "train.compile": "layers",
}
# LoopLM: 4 + 1 + 2 layers, T ~ Poisson(6), k = 3; 4.6 billion tokens in about 3 hours.
LOOP_LM = {
    "model.vocab_size": 50304,
    "model.dim": 1024,
    "model.heads": 16,
    "model.kv_heads": 8,
    "model.prelude_layers": 4,
    "model.core_layers": 1,
    "model.ffn": "swiglu",
    "model.ffn_dim": 2816,
    "model.injection": "add",
    "model.input_matrix": False,
    "model.output_matrix": False,
    "model.encoded_norm": False,
    "model.value_embeddings": "none",
    "depth.mean": 6,
    "depth.backprop": 3,
    "train.sequence_length": 1024,
    "train.micro_batch": 32,
    "train.global_batch": 256,
    "parallel.engine": "ddp",
}
LOOP_LM_RATE = 4.6e9 / (3 * 3600) / 2
TABLE = (
    Published(
        words="Huginn 3.5B, one node",
        source="arXiv:2502.05171, A.2: 108.75 TFLOP/s per device",
        preset="huginn_3_5b",
        device="mi250x",
        devices=8,
        tokens_per_second=(108.75e12 / HUGINN_FLOPS, 108.75e12 / HUGINN_FLOPS),
        settings=HUGINN | {"train.global_batch": 8},
    ),
    Published(
        words="Huginn 3.5B, 512 nodes",
        source="arXiv:2502.05171, A.2: 1.0 to 1.2 million tokens/s in all",
        preset="huginn_3_5b",
        device="mi250x",
        devices=4096,
        tokens_per_second=(1.0e6 / 4096, 1.2e6 / 4096),
        settings=HUGINN,
    ),
    Published(
        words="LoopLM 135M, after Parcae",
        source="huggingface.co/harims95/LoopLM-135M-naive: 4.6B tokens in about 3 h",
        preset="parcae_140m",
        device="h100",
        devices=2,
        tokens_per_second=(LOOP_LM_RATE, LOOP_LM_RATE),
        settings=LOOP_LM,
    ),
)


def plan_throughput(each: Published) -> dict[str, Any]:
    """Return the planned tokens per second of a device, and its error against the nearest published figure."""
    config = load_config(MODELS / f"{each.preset}.yaml", each.settings)
    loops, with_grad, _ = plan_depths(config.depth)
    layout = Layout.of(config.parallel, each.devices)
    _, _, time = step_time(config, layout, DEVICES[each.device], (loops, with_grad))
    planned = config.train.global_batch * config.train.sequence_length / time.expected / each.devices
    low, high = each.tokens_per_second
    return {"words": each.words, "planned": planned, "error": planned / min(max(planned, low), high) - 1}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    return make_parser(__doc__, out=None).parse_args()


def main() -> None:
    """Print a row per published figure."""
    options = parse_options()
    print(format_header(["run", "devices", "tokens/s per device, published", "planned", "error", "source"], left=1))
    found = []
    for each in TABLE:
        row = plan_throughput(each)
        found.append(row)
        published = " to ".join(dict.fromkeys(f"{value:,.0f}" for value in each.tokens_per_second))
        where = f"{each.devices:,} x {DEVICES[each.device].name}"
        print(format_row([each.words, where, published, f"{row['planned']:,.0f}", f"{row['error']:+.0%}", each.source]))
    write_numbers(options, {"rows": found})


if __name__ == "__main__":
    main()
