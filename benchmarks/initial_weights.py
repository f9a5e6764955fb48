"""Numbers per second of the noise of initial weights, beside torch's sequential truncated normal, which it replaced.

python benchmarks/initial_weights.py [--rounds 7] [--threads 1] [--out FILE.json]
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row

from megatron_rdt.model.initial_noise import fill_by_index, normal_noise, whole_block

SHAPE, STD = (4096, 4096), 0.02


def main() -> None:
    """Time both in turns, in CPU time, and print medians."""
    parser = make_parser(__doc__, rounds=7, threads=1, out=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight, generator = torch.zeros(SHAPE), torch.Generator().manual_seed(0)
    blocks = [whole_block(weight)]
    methods: dict[str, Callable[[], object]] = {
        "torch.nn.init.trunc_normal_": lambda: torch.nn.init.trunc_normal_(
            weight, std=STD, a=-3 * STD, b=3 * STD, generator=generator
        ),
        "counter-based noise": lambda: fill_by_index(blocks, SHAPE, lambda index: normal_noise(1, index, STD)),
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, run in methods.items():
            begun = time.process_time()
            run()
            rates[name].append(weight.numel() / (time.process_time() - begun))
    print(format_header(["method", "10^6 numbers per second"], left=1))
    for name, found in rates.items():
        print(format_row([f"`{name}`" if "." in name else name, f"{median(found) / 1e6:.0f}"]))
    write_numbers(options, {"rates": rates})


if __name__ == "__main__":
    main()
