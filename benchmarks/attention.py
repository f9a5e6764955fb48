"""What one decoded token costs in one layer's attention, for each kind, with a cache of some length.

The sizes are those of OpenMythos 1B. "Expanded" is multi-head latent attention that makes keys and values of all earlier
positions at every token, for comparison. Operations are counted by PyTorch; times are medians, the cases interleaved.

    python benchmarks/attention.py [--positions 1024 4096] [--rounds 15]
"""

import argparse
import dataclasses
import statistics
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_rdt.config import ModelConfig
from megatron_rdt.inference import KVCache
from megatron_rdt.model.attention.gqa import ATTENTIONS
from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.forward_context import LayerContext

SIZES = ModelConfig(
    dim=2048, heads=16, kv_heads=4, kv_rank=256, query_rank=512, nope_dim=64, rope_dim=32, value_dim=64, core_layers=1
)
CASES = {"gqa": "gqa", "mla": "mla", "mla, expanded": "mla"}


def make(kind: str, expanded: bool) -> nn.Module:
    """One layer's attention with random weights."""
    config = dataclasses.replace(SIZES, attention=kind)
    module = ATTENTIONS[kind](config, index=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if expanded:
        module.absorbs = lambda queries, keys: False
    return module.eval()


def context(kind: str, start: int, length: int) -> LayerContext:
    """Of `length` positions after `start`."""
    channels = dataclasses.replace(SIZES, attention=kind).rotary_dim
    tables = rotary_tables(torch.arange(start, start + length), channels, SIZES.rope_base, torch.float32)
    seen = torch.ones(length, start + length, dtype=torch.bool).tril(start)
    return LayerContext(tables, seen, torch.float32, torch.zeros(1, length, dtype=torch.long), start)


@torch.no_grad()
def measure(positions: int, rounds: int) -> dict[str, tuple[int, float, float]]:
    """By case: numbers cached per position, MFLOP and milliseconds of one token."""
    modules = {name: make(kind, name.endswith("expanded")) for name, kind in CASES.items()}
    caches, seconds, counted = {}, {name: [] for name in CASES}, {}
    x = torch.randn(1, positions + 1, SIZES.dim, generator=torch.Generator().manual_seed(1))
    for name, kind in CASES.items():
        caches[name] = KVCache()
        modules[name](x[:, :positions], context(kind, 0, positions), caches[name], 0)

    def decode(name: str) -> None:
        modules[name](x[:, positions:], context(CASES[name], positions, 1), caches[name], 0)

    for name in CASES:
        decode(name)  # the cache grows
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            decode(name)
        counted[name] = counter.get_total_flops() / 1e6
    for _ in range(rounds):
        for name in CASES:
            began = time.perf_counter()
            decode(name)
            seconds[name].append(time.perf_counter() - began)
    kept = {name: cache.elements for name, cache in caches.items()}
    return {name: (kept[name], counted[name], 1e3 * statistics.median(seconds[name])) for name in CASES}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096], help="lengths of the cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {positions: measure(positions, options.rounds) for positions in options.positions}
    heads = " | ".join(f"{positions:,} positions: MFLOP, ms" for positions in results)
    print(f"| | numbers cached per position | {heads} |\n|---|{'---:|' * (1 + len(results))}")
    for name in CASES:
        cells = " | ".join(f"{found[name][1]:,.0f}, {found[name][2]:.1f}" for found in results.values())
        print(f"| {name} | {next(iter(results.values()))[name][0]:,} | {cells} |")


if __name__ == "__main__":
    main()
