"""The device of a GPU check, engines and batches of two sizes on it, and the findings that sections yield."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tools.timing import Clock, make_clock, measure_seconds

from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.environment import read_process_info
from megatron_rdt.parallel import Engine, MicroBatch, build_engine
from megatron_rdt.parallel.process_group import join_process_group

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# A dry run keeps the kinds of layers and makes all of them small.
TINY = ["model.dim=64", "model.heads=2", "model.kv_heads=2", "model.ffn_dim=128", "model.vocab_size=512"]
TINY_LENGTH = 64


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        case: what was tried.
        result: what came out, in words and figures.
        passed: whether that is right; None for a measurement, which has no right value.
        figures: the numbers, for the JSON.
    """

    case: str
    result: str
    passed: bool | None = None
    figures: dict[str, Any] = field(default_factory=dict)


Section = Callable[["Machine"], Iterator[Finding]]


class Machine:
    """The device of a check, and what its sections build there.

    Attributes:
        dry: True for tiny sizes on the CPU, which only tries the script.
        device: where everything is computed.
        clock: waits for the device.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self.clock: Clock = make_clock(self.device, threads=0)

    def load_config(
        self, words: Sequence[str], sequences: int = 2, length: int = 512, base: str = "smoke"
    ) -> RunConfig:
        """Return the config `base` for one process, with `words` ("model.dim=64"), made tiny in a dry run."""
        length = TINY_LENGTH if self.dry else length
        batch = [f"train.micro_batch={sequences}", f"train.global_batch={sequences}", f"train.sequence_length={length}"]
        fixed = ["parallel.engine=single", f"train.device={self.device.type}", "optimizer.name=adamw"]
        return load_config(CONFIGS / f"{base}.yaml", [*batch, *fixed, *words, *(TINY if self.dry else [])])

    def build_engine(self, config: RunConfig) -> Engine:
        """Set the device up as a run of this config does, and build its engine there."""
        return build_engine(config, join_process_group(config, read_process_info()))

    def draw_batch(
        self, config: RunConfig, loops: Sequence[int], documents: bool = False, seed: int = 1
    ) -> list[MicroBatch]:
        """Return a micro-batch of random tokens with T = loops[i] in row i and the config's k.

        Args:
            config: gives the vocabulary and the length.
            loops: T of each sequence.
            documents: five documents in each row, of which a token sees its own only.
            seed: of the tokens.
        """
        length = config.train.sequence_length + 1
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, config.model.vocab_size, (len(loops), length), generator=generator)
        numbers = (torch.arange(length) // (length // 5)).expand(len(loops), -1).contiguous() if documents else None
        k = None if config.depth.backprop == "all" else int(config.depth.backprop)
        plan = DepthPlan(tuple(loops), k, tuple(range(1, len(loops) + 1)))
        return [MicroBatch(Batch(tokens, documents=numbers).to(self.device), plan)]

    def measure_seconds(self, run: Callable[[], object], calls: int = 3) -> float:
        """Return the least seconds of a call, after one that warms up."""
        run()
        return min(measure_seconds(run, self.clock) for _ in range(calls))


@contextmanager
def freed_memory(machine: Machine) -> Iterator[None]:
    """Free what earlier cases held, restart the count of the peak, and forget compiled code afterwards."""
    gc.collect()
    if not machine.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()


def compare_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest error of a gradient, |got - expected| over |expected| (Frobenius norms), and its name."""
    errors = {}
    for name, reference in expected.items():
        difference = torch.linalg.vector_norm(got[name].double() - reference.double())
        errors[name] = float(difference / torch.linalg.vector_norm(reference.double()).clamp_min(1e-30))
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
