"""Traffic and bubble of a loop ring, from its schedule."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthSampler
from megatron_rdt.parallel.ring_schedule import schedule_ring
from megatron_rdt.planner.parameters import Parameter, list_parameters
from megatron_rdt.planner.shape import FLOAT32

DRAWN_STEPS = 16  # of which the bubble of drawn T is the mean


@dataclass(frozen=True)
class RingTraffic:
    """Messages and collectives of a process of stage 0, which sends the most, in a forward or backward pass of the ring.

    Attributes:
        hops, hop_bytes: number of states that it sends to the next or last stage, and the bytes of each.
        others, other_bytes: number of other tensors that it sends, from or to the sequences' processes, and their bytes in all.
    """

    hops: int
    hop_bytes: float
    others: int
    other_bytes: float


def ring_traffic(config: RunConfig, layout: Layout, laps: int, backwards: bool) -> RingTraffic:
    """Count what stage 0 sends in a pass of one micro-batch of every process, with so many laps of each sequence."""
    model, own = config.model, config.train.micro_batch
    stream = FLOAT32 * config.train.sequence_length * model.dim
    state, prepared = stream * (model.lanes if model.injection == "hyper" else 1), stream * prepared_copies(model)
    # Forward, the states after and before the last lap; backward, gradients of initial states and prepared inputs.
    sizes = (state, prepared) if backwards else (state, state)
    strangers = (layout.ring - 1) * own
    return RingTraffic(layout.ring * own * laps, stream, strangers * len(sizes), strangers * sum(sizes))


def prepared_copies(model: ModelConfig) -> int:
    """Return how many tensors of the stream's size the injection prepares of the encoded input."""
    return 2 if model.injection == "gate" else 1


def stage_parameters(config: RunConfig, layout: Layout) -> list[Parameter]:
    """Return the parameters of stage 0: those of its core layers."""
    first = tuple(f"core.layers.{i}." for i in range(config.model.core_layers // layout.ring))
    return [p for p in list_parameters(config.model) if p.name.startswith(first)]


def list_ring_bubbles(config: RunConfig, layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    """Yield ticks and visits per stage, forward and backward, of a ring's passes in the first steps of a run.

    They are those of the run's own draws of T: with one T for all sequences, the same in every step but for T.
    """
    sampler, own = DepthSampler(config.depth, config.run.seed), config.train.micro_batch
    share = config.train.global_batch // layout.data
    owners = [stage for stage in range(layout.ring) for _ in range(own)]
    for step in range(DRAWN_STEPS):
        k = sampler.backprop_at(step)
        for first in range(0, share, own):
            loops: list[int] = []
            for rank in layout.ring_data_ranks(0):
                rows = range(rank * share + first, rank * share + first + own)
                loops += sampler.draw_loops(step, rows, own, share // own)
            counted = [t if k is None else min(t, k) for t in loops]
            forward, backward = (schedule_ring(layout.ring, laps, owners) for laps in (loops, counted))
            yield forward.ticks, sum(loops), backward.ticks, sum(counted)


def ring_bubbles(config: RunConfig, layout: Layout) -> tuple[float, float]:
    """Return the shares of the forward and the backward passes of the ring in which a stage is idle; 0 without a ring."""
    if layout.ring == 1:
        return 0.0, 0.0
    ticks, visits, ticks_back, visits_back = map(sum, zip(*list_ring_bubbles(config, layout)))
    return 1 - visits / ticks, 1 - visits_back / ticks_back
