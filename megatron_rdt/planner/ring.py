"""Traffic and bubble of a loop ring, from its schedule."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_rdt.config import DepthConfig, ModelConfig, RunConfig
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
    stream = FLOAT32 * config.train.sequence_length * model.dim / (layout.context * layout.tensor)
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


@lru_cache(maxsize=64)
def _sum_ticks(depth: DepthConfig, seed: int, batch: int, own: int, layout: Layout) -> tuple[int, int, int, int]:
    """Sum ticks and visits per stage, forward and backward, of a ring's passes in the first steps of a run.

    They are those of the run's own draws of T: with one T for all sequences, the same in every step but for T.

    Args:
        depth, seed: of the run.
        batch: sequences of a step.
        own: sequences of a micro-batch of one process.
        layout: of the processes.
    """
    sampler, share = DepthSampler(depth, seed), batch // layout.data
    owners = [stage for stage in range(layout.ring) for _ in range(own)]
    ticks = visits = ticks_back = visits_back = 0
    for step in range(DRAWN_STEPS):
        k = sampler.backprop_at(step)
        drawn = sampler.draw_loops(step, range(batch), own, share // own)
        for first in range(0, share, own):
            starts = (rank * share + first for rank in layout.ring_data_ranks(0))
            loops = [t for start in starts for t in drawn[start : start + own]]
            counted = [t if k is None else min(t, k) for t in loops]
            forward, backward = (schedule_ring(layout.ring, laps, owners) for laps in (loops, counted))
            ticks, visits = ticks + forward.ticks, visits + sum(loops)
            ticks_back, visits_back = ticks_back + backward.ticks, visits_back + sum(counted)
    return ticks, visits, ticks_back, visits_back


def ring_bubbles(config: RunConfig, layout: Layout) -> tuple[float, float]:
    """Return the shares of the forward and the backward passes of the ring in which a stage is idle; 0 without a ring."""
    if layout.ring == 1:
        return 0.0, 0.0
    train = config.train
    # The other axes do not matter, and a search asks about all of them.
    data = Layout(replicate=layout.replicate, shard=layout.shard, ring=layout.ring)
    sums = _sum_ticks(config.depth, config.run.seed, train.global_batch, train.micro_batch, data)
    ticks, visits, ticks_back, visits_back = sums
    return 1 - visits / ticks, 1 - visits_back / ticks_back
