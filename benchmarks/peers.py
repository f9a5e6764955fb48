"""Training and generation speed and peak memory beside other implementations of recurrent depth.

Peers: open-mythos 0.5.0, Parcae, Huginn, and a plain PyTorch loop (`peer_models/`). Beside each runs this project's model
with the peer's parts and shapes; the numbers of parameters must agree. Both sides take the same tokens and the same T, and
have the same optimizer (fused AdamW) and clipping. A training step is forward, loss, backward, clipping, AdamW.

The sides take turns in one process, one step each; the ratio is taken within a round and its median over the rounds is
printed, with the smallest and largest. The clock is CPU time of the process over all its threads: other programs change it
little with one thread, but with more than one waiting threads spin, so leave the machine alone then. Peak memory is
that of a fresh process per case, in which the C library gives freed blocks back.

The floor is the time that the step's FLOPs (megatron_rdt/model/flops.py) take at the rate at which this machine multiplies
matrices of the model's shapes, which is measured in every round; for generation, at the rate of single rows.

    python benchmarks/peers.py [--peers Huginn Parcae] [--threads 1] [--rounds 5] [--out FILE.json] [--profile]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_models import PEERS, Peer, Work
from peer_models.base import Sizes
from tools.operators import profiled, shares
from tools.rates import product_rate, product_shapes
from torch import nn

from megatron_rdt.config import DepthConfig, RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.inference import generate
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.parallel import Engine, MicroBatch, make_engine
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
LR, MAX_NORM = 1e-4, 1.0
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc: mapped, hence returned when freed
PASSED_ON = ("batch", "sequence", "threads", "rounds")


class Bench:
    """Both sides of one peer, and what they take turns at.

    Args:
        peer: the other side.
        options: batch, sequence, threads.
        sides: which of "peer" and "ours" to build.
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
            self.engine = self._engine()

    def _engine(self) -> Engine:
        engine = make_engine(RunConfig(model=self.config), torch.device("cpu"))
        with torch.device("meta"):
            model = RecurrentDepthTransformer(self.config)
        engine.setup(model)
        return engine

    def loops(self, work: Work, round_number: int) -> tuple[int, ...]:
        """T of each sequence."""
        if work.per_sequence:
            return self.depths.iterations(round_number, range(self.batch), self.batch)
        return (work.loops,) * self.batch

    def peer_step(self, work: Work, loops: tuple[int, ...]) -> None:
        """The peer's turn."""
        if work.generate:
            self.peer.generate(self.model, self.tokens[:1, :PROMPT], work.loops, NEW_TOKENS)
            return
        self.peer.loss(self.model, self.inputs, self.targets, work, loops).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def our_step(self, work: Work, loops: tuple[int, ...]) -> None:
        """This project's turn."""
        if work.generate:
            generate(self.engine.model, self.tokens[:1, :PROMPT], work.loops, NEW_TOKENS)
            return
        self.engine.model.core.checkpoint_iterations = work.checkpoint
        self.engine.forward_backward([MicroBatch(Batch(self.tokens), DepthPlan(loops, work.backprop))])
        self.engine.clip(MAX_NORM)
        self.engine.step(LR)

    def step(self, side: str, work: Work, loops: tuple[int, ...]) -> None:
        """The turn of a side."""
        (self.our_step if side == "ours" else self.peer_step)(work, loops)

    def count(self) -> dict[str, int]:
        """Trained parameters of both sides, which must agree."""
        peer, ours = (sum(p.numel() for p in model.parameters()) for model in (self.model, self.engine.model))
        more = self.peer.more_here(self.sizes)
        assert ours == peer + more, (
            f"{self.peer.name} has {peer} parameters, the model here {ours}; expected {more} more"
        )
        return {"peer": peer, "ours": ours}

    def work_flops(self, work: Work, loops: tuple[int, ...]) -> float:
        """Of one turn without recomputation; generation's prompt and new tokens count alike."""
        if work.generate:
            forward = forward_flops(self.config, PROMPT + NEW_TOKENS // 2)
            once = forward.prelude + forward.around + forward.coda
            return NEW_TOKENS * (once + work.loops * forward.iteration)
        with_gradient = [min(t, work.backprop or t) for t in loops]
        forward = forward_flops(self.config, self.sequence)
        mean, mean_gradient = statistics.mean(loops), statistics.mean(with_gradient)
        return self.batch * self.sequence * training_flops(self.config, forward, mean, mean_gradient)

    def rate(self, work: Work) -> float:
        """FLOP/s of products of the model's shapes."""
        rows = 1 if work.generate else self.batch * self.sequence
        return product_rate(product_shapes(self.engine.model, rows), backward=not work.generate)


def timed(function: Callable[..., None], *arguments: Any) -> float:
    """CPU seconds of the process."""
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def measure_times(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Parameters, and by work the rounds: seconds of both sides and of the floor, tokens."""
    bench = Bench(peer, options, ("peer", "ours"))
    results: dict[str, Any] = {"parameters": bench.count(), "works": {}}
    for work in WORKS:
        if not peer.runs(work):
            continue
        rounds = []
        for number in range(options.rounds + 1):
            loops = bench.loops(work, number)
            order = ("peer", "ours") if number % 2 else ("ours", "peer")
            row = {side: timed(bench.step, side, work, loops) for side in order}
            row["rate"] = bench.rate(work)
            rounds.append(row | {"floor": bench.work_flops(work, loops) / row["rate"]})
        results["works"][work.name] = rounds[1:]
    return results


def measure_memory(peer: Peer, options: argparse.Namespace, side: str, work: Work) -> float:
    """Peak memory in MB of a process that takes two turns, the second with optimizer state."""
    bench = Bench(peer, options, (side,))
    for number in range(2):
        bench.step(side, work, bench.loops(work, number))
    return 1e3 * peak_memory_gb(torch.device("cpu"))


def profile(peer: Peer, options: argparse.Namespace) -> None:
    """Where the time of both sides' step at T = 4 goes."""
    bench = Bench(peer, options, ("peer", "ours"))
    for side in ("peer", "ours"):
        turn = lambda side=side: bench.step(side, WORKS[1], bench.loops(WORKS[1], 0))  # noqa: E731
        turn()
        times, table = profiled(turn)
        print(f"{peer.name}, {side}: {shares(times)}\n{table if options.verbose else ''}", flush=True)


def in_fresh_process(options: argparse.Namespace, *case: str) -> Any:
    """What one part of this script prints as JSON, run by itself; None where the peer's code is not there."""
    words = [f"--{name}={getattr(options, name)}" for name in PASSED_ON]
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--case", *case]
    environment = os.environ | (RETURN_FREED_BLOCKS if case[0] == "memory" else {})
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(case)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def run_case(options: argparse.Namespace) -> Any:
    """The result of `--case`."""
    kind, name, *rest = options.case
    try:
        if kind == "times":
            return measure_times(PEERS[name], options)
        return measure_memory(PEERS[name], options, rest[0], next(work for work in WORKS if work.name == rest[1]))
    except ImportError as error:
        return {"missing": str(error)}


def summary(work: Work, rounds: list[dict[str, float]], memory: dict[str, float], options: argparse.Namespace) -> dict:
    """One line of the table."""
    tokens = NEW_TOKENS if work.generate else options.batch * options.sequence
    ratios = sorted(r["peer"] / r["ours"] for r in rounds)
    return {
        "work": work.name,
        **{
            f"{side} tokens/s": tokens / statistics.median(r[side] for r in rounds)
            for side in ("peer", "ours", "floor")
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "share": statistics.median(r["floor"] / r["ours"] for r in rounds),
        "peer share": statistics.median(r["floor"] / r["peer"] for r in rounds),
        "GFLOP/s": statistics.median(r["rate"] for r in rounds) / 1e9,
        **{f"{side} MB": memory[side] for side in memory},
    }


HEADER = (
    "| Work | peer tokens/s | ours tokens/s | ours / peer | floor tokens/s | peer's share | our share | peer MB | ours MB |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def line(row: dict[str, Any]) -> str:
    """Markdown."""
    low, high = row["ratios"][0], row["ratios"][-1]
    cells = [row["work"], f"{row['peer tokens/s']:.0f}", f"{row['ours tokens/s']:.0f}"]
    cells += [f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{row['floor tokens/s']:.0f}"]
    cells += [f"{100 * row['peer share']:.0f} %", f"{100 * row['share']:.0f} %"]
    cells += [f"{row[f'{side} MB']:.0f}" if f"{side} MB" in row else "-" for side in ("peer", "ours")]
    return f"| {' | '.join(cells)} |"


def compare(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one peer and print its table."""
    times = in_fresh_process(options, "times", peer.name)
    if "missing" in times:
        print(f"\n{peer.name}: skipped, {times['missing']}. To get it: {peer.install}", flush=True)
        return times
    count = times["parameters"]
    print(f"\n{peer.name}: {count['peer']:,} parameters, here {count['ours']:,}\n\n{HEADER}", flush=True)
    rows = []
    for work in WORKS:
        if work.name not in times["works"]:
            continue
        sides = ("peer", "ours") if options.memory else ()
        memory = {side: in_fresh_process(options, "memory", peer.name, side, work.name) for side in sides}
        rows.append(summary(work, times["works"][work.name], memory, options))
        print(line(rows[-1]), flush=True)
    return {"parameters": count, "rows": rows, "rounds": times["works"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), help="which ones")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one to warm up")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes instead")
    parser.add_argument("--verbose", action="store_true", help="with --profile: the table of operators too")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument(
        "--case", nargs="+", help="measure one part and print it as JSON: times PEER, or memory PEER SIDE WORK"
    )
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options)))
        return
    if options.profile:
        for name in options.peers:
            profile(PEERS[name], options)
        return
    print(
        f"{options.batch} x {options.sequence} tokens, {options.threads} thread(s), torch {torch.__version__}; tokens per "
        f"CPU-second, medians of {options.rounds} rounds. Generation: 1 row, {PROMPT} + {NEW_TOKENS} tokens."
    )
    results = {name: compare(PEERS[name], options) for name in options.peers}
    ratios = [row["ratio"] for result in results.values() for row in result.get("rows", [])]
    if ratios:
        print(f"\nOurs / peer over all rows: least {min(ratios):.2f}, median {statistics.median(ratios):.2f}")
    if options.out:
        settings = {name: getattr(options, name) for name in PASSED_ON}
        options.out.write_text(json.dumps({"options": settings, "peers": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
