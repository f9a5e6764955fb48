"""Speed of training and generation and peak memory, compared with other implementations of recurrent depth.

Peers: open-mythos 0.5.0, Parcae, Huginn, and a plain PyTorch loop (`peer_models/`). Each is compared with this project's
model of the same parts and shapes; the numbers of parameters must agree. Both sides take the same tokens and the same T,
and have the same optimizer (fused AdamW) and clipping. A training step is forward, loss, backward, clipping, AdamW.

The sides take turns in one process, one step each; the ratio is taken within a round and its median over the rounds is
printed, with the smallest and largest. The clock is CPU time of the process over all its threads: other programs change it
little with one thread, but with more than one waiting threads spin, so leave the machine alone then. Peak memory is
that of a fresh process per case, in which the C library returns freed blocks to the system.

The floor is the time that the step's FLOPs (megatron_rdt/model/flops.py) take at the rate at which this machine multiplies
matrices of the model's shapes, which is measured in every round; for generation, at the rate of single rows.

    python benchmarks/peers.py [--peers Huginn Parcae] [--threads 1] [--rounds 5] [--out FILE.json] [--profile]
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from peer_models import PEERS, Peer, Work
from peer_models.base import Sizes
from tools.operators import format_shares, profile_step
from tools.options import make_parser, repeat_options, write_numbers
from tools.processes import run_fresh
from tools.rates import count_products, count_training_flops, measure_product_rate
from tools.steps import LR, MAX_NORM, take_step
from tools.tables import format_header, format_row
from tools.timing import measure_seconds
from torch import nn

from megatron_rdt.config import DepthConfig, RunConfig
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.inference import generate
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.flops import forward_flops
from megatron_rdt.parallel import build_engine
from megatron_rdt.train.hardware import peak_memory_gb

WORKS = (
    Work("train T = 1", 1),
    Work("train T = 4", 4),
    Work("train T = 8", 8),
    Work("train T = 8, k = 4", 8, backprop=4),
    Work("train T = 8, checkpointed", 8, checkpoint=True),
    Work("train T per sequence, mean 8, k = 4", 8, backprop=4, per_sequence=True),
    Work("generate T = 8", 8, generate=True),
)
PROMPT, NEW_TOKENS = 32, 32
PASSED_ON = ("batch", "sequence", "threads", "rounds")


class Bench:
    """Both sides of a comparison, a peer and this project, and the steps that they take in turn.

    Args:
        peer: the other side.
        options: batch, sequence, threads.
        sides: "peer", "ours", or both: the sides to build.
    """

    def __init__(self, peer: Peer, options: argparse.Namespace, sides: tuple[str, ...]) -> None:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.peer, self.batch, self.sequence = peer, options.batch, options.sequence
        self.sizes = Sizes(positions=options.sequence)
        self.config = peer.config(self.sizes)
        self.tokens = torch.randint(0, self.sizes.vocabulary, (self.batch, self.sequence + 1))
        self.inputs, self.targets = self.tokens[:, :-1].contiguous(), self.tokens[:, 1:].contiguous()
        self.depths = DepthSampler(DepthConfig(scheme="poisson", mean=8, max=64, per="sequence"), seed=0)
        if "peer" in sides:
            self.model = peer.build(self.sizes)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        if "ours" in sides:
            self.engine = build_engine(RunConfig(model=self.config), torch.device("cpu"))

    def draw_loops(self, work: Work, round_number: int) -> tuple[int, ...]:
        """T of each sequence in a round."""
        if work.per_sequence:
            return self.depths.draw_loops(round_number, range(self.batch), self.batch)
        return (work.loops,) * self.batch

    def step_peer(self, work: Work, loops: tuple[int, ...]) -> None:
        """Do the work once with the peer's model: generate, or train one step at T = `loops` of each sequence."""
        if work.generate:
            self.model.eval()
            with torch.no_grad():
                self.peer.generate(self.model, self.tokens[:1, :PROMPT], work.loops, NEW_TOKENS)
            self.model.train()
            return
        self.peer.loss(self.model, self.inputs, self.targets, work, loops).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step_ours(self, work: Work, loops: tuple[int, ...]) -> None:
        """Do the work once with this project's model."""
        if work.generate:
            generate(self.engine.model, self.tokens[:1, :PROMPT], work.loops, NEW_TOKENS)
            return
        set_checkpointing(self.engine.model, "per_iteration" if work.checkpoint else "none")
        take_step(self.engine, self.tokens, DepthPlan(loops, work.backprop))

    def step(self, side: str, work: Work, loops: tuple[int, ...]) -> None:
        """Do the work once with the model of a side."""
        (self.step_ours if side == "ours" else self.step_peer)(work, loops)

    def count_parameters(self) -> dict[str, int]:
        """Count both sides' parameters; AssertionError if ours are not the peer's plus the known extras."""
        peer, ours = (sum(p.numel() for p in model.parameters()) for model in (self.model, self.engine.model))
        more = self.peer.count_extra_parameters(self.sizes)
        message = f"{self.peer.name} has {peer} parameters, the model here {ours}; expected {more} more"
        assert ours == peer + more, message
        return {"peer": peer, "ours": ours}

    def count_flops(self, work: Work, loops: tuple[int, ...]) -> float:
        """FLOPs of the work without recomputation; for generation, those of its new tokens at their mean position."""
        if work.generate:
            forward = forward_flops(self.config, PROMPT + NEW_TOKENS // 2)
            once = forward.prelude + forward.around + forward.coda
            return NEW_TOKENS * (once + work.loops * forward.iteration)
        return count_training_flops(self.config, DepthPlan(loops, work.backprop), self.sequence)

    def measure_rate(self, work: Work) -> float:
        """FLOP/s at which this machine multiplies matrices of the model's shapes."""
        rows = 1 if work.generate else self.batch * self.sequence
        return measure_product_rate(count_products(self.engine.model, rows), backward=not work.generate)


def measure_times(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Time every kind of work; return parameter counts and, per round, seconds of both sides, FLOP/s and the least seconds."""
    bench = Bench(peer, options, ("peer", "ours"))
    results: dict[str, Any] = {"parameters": bench.count_parameters(), "works": {}}
    for work in WORKS:
        if not peer.runs(work):
            continue
        rounds = []
        for number in range(options.rounds + 1):
            loops = bench.draw_loops(work, number)
            order = ("peer", "ours") if number % 2 else ("ours", "peer")  # neither always follows the other
            row = {side: measure_seconds(partial(bench.step, side, work, loops), time.process_time) for side in order}
            row["rate"] = bench.measure_rate(work)
            rounds.append(row | {"floor": bench.count_flops(work, loops) / row["rate"]})
        results["works"][work.name] = rounds[1:]
    return results


def measure_memory(peer: Peer, options: argparse.Namespace, side: str, work: Work) -> float:
    """Do the work twice in this process, at last with optimizer state; return the process's peak memory in MB."""
    bench = Bench(peer, options, (side,))
    for number in range(2):
        bench.step(side, work, bench.draw_loops(work, number))
    return 1e3 * peak_memory_gb(torch.device("cpu"))


def print_profile(peer: Peer, options: argparse.Namespace) -> None:
    """Print the shares of the kinds of operators in both sides' step at T = 4."""
    bench = Bench(peer, options, ("peer", "ours"))
    for side in ("peer", "ours"):
        step = partial(bench.step, side, WORKS[1], bench.draw_loops(WORKS[1], 0))
        step()
        times, table = profile_step(step)
        print(f"{peer.name}, {side}: {format_shares(times)}\n{table if options.verbose else ''}", flush=True)


def measure_alone(options: argparse.Namespace, *case: str) -> Any:
    """Run this script with --case in a fresh process: return its times, its peak MB or {"missing": reason}."""
    words = repeat_options(options, PASSED_ON)
    return run_fresh(__file__, *words, "--case", *case, return_freed_blocks=case[0] == "memory")


def measure_case(options: argparse.Namespace) -> Any:
    """Measure what --case names in this process: return times, peak MB, or {"missing": reason} without the peer."""
    kind, name, *rest = options.case
    try:
        if kind == "times":
            return measure_times(PEERS[name], options)
        return measure_memory(PEERS[name], options, rest[0], next(work for work in WORKS if work.name == rest[1]))
    except ImportError as error:
        return {"missing": str(error)}


def summarize(work: Work, rounds: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    """Return a line's figures from its rounds: median tokens/s, peer / ours seconds, floor shares, GFLOP/s."""
    median = statistics.median
    speeds = {f"{side} tokens/s": tokens / median(r[side] for r in rounds) for side in ("peer", "ours", "floor")}
    ratios = sorted(r["peer"] / r["ours"] for r in rounds)
    return {
        "work": work.name,
        **speeds,
        "ratio": median(ratios),
        "ratios": ratios,
        "share": median(r["floor"] / r["ours"] for r in rounds),
        "peer share": median(r["floor"] / r["peer"] for r in rounds),
        "GFLOP/s": median(r["rate"] for r in rounds) / 1e9,
    }


COLUMNS = (
    "peer tokens/s", "ours tokens/s", "ours / peer", "floor tokens/s", "peer's share", "our share", "peer MB", "ours MB",
)  # fmt: skip


def format_line(row: dict[str, Any]) -> str:
    """Format a row: work, tokens/s of both, ratio and its range, floor, shares of the floor, peak MB or "-"."""
    low, high = row["ratios"][0], row["ratios"][-1]
    cells = [row["work"], f"{row['peer tokens/s']:.0f}", f"{row['ours tokens/s']:.0f}"]
    cells += [f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{row['floor tokens/s']:.0f}"]
    cells += [f"{100 * row['peer share']:.0f} %", f"{100 * row['share']:.0f} %"]
    cells += [f"{row[f'{side} MB']:.0f}" if f"{side} MB" in row else "-" for side in ("peer", "ours")]
    return format_row(cells)


def compare_with(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one peer and print its table; return its parameters, rows and rounds, or {"missing": reason}."""
    times = measure_alone(options, "times", peer.name)
    if "missing" in times:
        print(f"\n{peer.name}: skipped, {times['missing']}. To get it: {peer.install}", flush=True)
        return times
    count = times["parameters"]
    header = format_header(["Work", *COLUMNS], left=1)
    print(f"\n{peer.name}: {count['peer']:,} parameters, here {count['ours']:,}\n\n{header}", flush=True)
    rows = []
    for work in WORKS:
        if work.name not in times["works"]:
            continue
        tokens = NEW_TOKENS if work.generate else options.batch * options.sequence
        row = summarize(work, times["works"][work.name], tokens)
        for side in ("peer", "ours") if options.memory else ():
            row[f"{side} MB"] = measure_alone(options, "memory", peer.name, side, work.name)
        rows.append(row)
        print(format_line(row), flush=True)
    return {"parameters": count, "rows": rows, "rounds": times["works"]}


def main() -> None:
    """Compare the peers one after another; with --case, measure one part and print it as JSON."""
    parser = make_parser(__doc__, batch=4, sequence=256, threads=1, rounds=5, out=None)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), help="peers to compare with")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--profile", action="store_true", help="print the time of a step by kind of operator instead")
    parser.add_argument("--verbose", action="store_true", help="with --profile: the table of operators too")
    case_help = "measure one part and print it as JSON: times PEER, or memory PEER SIDE WORK"
    parser.add_argument("--case", nargs="+", help=case_help)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure_case(options)))
        return
    if options.profile:
        for name in options.peers:
            print_profile(PEERS[name], options)
        return
    print(
        f"{options.batch} x {options.sequence} tokens, {options.threads} thread(s), torch {torch.__version__}; tokens per "
        f"CPU-second, medians of {options.rounds} rounds. Generation: 1 row, {PROMPT} + {NEW_TOKENS} tokens."
    )
    results = {name: compare_with(PEERS[name], options) for name in options.peers}
    ratios = [row["ratio"] for result in results.values() for row in result.get("rows", [])]
    if ratios:
        print(f"\nOurs / peer over all rows: least {min(ratios):.2f}, median {statistics.median(ratios):.2f}")
    write_numbers(options, {"peers": results})


if __name__ == "__main__":
    main()
