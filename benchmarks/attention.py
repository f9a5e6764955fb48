"""Cost of one decoded token in one layer's attention, for each kind, with a cache of some length.

The sizes are those of OpenMythos 1B. "Expanded" is multi-head latent attention that expands the keys and values of all
earlier positions at every token, for comparison. Operations are counted by PyTorch; times are medians, the cases
interleaved.

    python benchmarks/attention.py [--positions 1024 4096] [--rounds 15]
"""

import dataclasses
import statistics
import time
from functools import partial

import torch
from tools.options import make_parser
from tools.tables import format_header, format_row
from tools.timing import measure_in_turn
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


def make_attention(kind: str, expanded: bool) -> nn.Module:
    """Make one layer's attention with random weights; `expanded` makes a latent one expand all keys and values."""
    config = dataclasses.replace(SIZES, attention=kind)
    module = ATTENTIONS[kind](config, index=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if expanded:
        module.is_absorbing_cheaper = lambda queries, keys: False
    return module.eval()


def make_context(kind: str, start: int, length: int, cache: KVCache) -> LayerContext:
    """The context of a forward pass over `length` positions, the first of which is `start`."""
    channels = dataclasses.replace(SIZES, attention=kind).rotary_dim
    tables = rotary_tables(torch.arange(start, start + length), channels, SIZES.rope_base, torch.float32)
    seen = torch.ones(length, start + length, dtype=torch.bool).tril(start)
    return LayerContext(tables, seen, torch.float32, torch.zeros(1, length, dtype=torch.long), start, cache=cache)


@torch.no_grad()
def measure_decoding(positions: int, rounds: int) -> dict[str, tuple[int, float, float]]:
    """Decode a token after `positions` others; return by case numbers cached per position, MFLOP, milliseconds."""
    modules = {name: make_attention(kind, name.endswith("expanded")) for name, kind in CASES.items()}
    caches, counted = {}, {}
    x = torch.randn(1, positions + 1, SIZES.dim, generator=torch.Generator().manual_seed(1))
    for name, kind in CASES.items():
        caches[name] = KVCache()
        modules[name](x[:, :positions], make_context(kind, 0, positions, caches[name]))

    def decode(name: str) -> None:
        modules[name](x[:, positions:], make_context(CASES[name], positions, 1, caches[name]))

    for name in CASES:
        decode(name)  # makes room in the cache, so that later calls do not
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            decode(name)
        counted[name] = counter.get_total_flops() / 1e6
    seconds = measure_in_turn({name: partial(decode, name) for name in CASES}, rounds, time.perf_counter)
    kept = {name: cache.elements for name, cache in caches.items()}
    return {name: (kept[name], counted[name], 1e3 * statistics.median(seconds[name])) for name in CASES}


def main() -> None:
    """Measure every length of the cache and print a Markdown table, one line per kind of attention."""
    parser = make_parser(__doc__, rounds=15, threads=1)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096], help="lengths of the cache")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {positions: measure_decoding(positions, options.rounds) for positions in options.positions}
    columns = [f"{positions:,} positions: MFLOP, ms" for positions in results]
    print(format_header(["", "numbers cached per position", *columns], left=1))
    for name in CASES:
        cells = [f"{found[name][1]:,.0f}, {found[name][2]:.1f}" for found in results.values()]
        print(format_row([name, f"{next(iter(results.values()))[name][0]:,}", *cells]))


if __name__ == "__main__":
    main()
