"""Memory of weights in a loop ring and under DeepSpeed, and the choice among all kinds by the run's engine."""

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.parameters import ROOT, Parameter
from megatron_rdt.planner.ring import stage_parameters
from megatron_rdt.planner.shape import FLOAT32
from megatron_rdt.planner.weights import (
    BUFFERS,
    CORE,
    GRADIENTS,
    OPTIMIZER,
    OTHER,
    UNREDUCED,
    WEIGHTS,
    ShardedWeights,
    Weights,
)
from megatron_rdt.planner.zero_gathers import BACKWARD, list_zero_gathers, zero_options


class RingWeights(ShardedWeights):
    """Weights of a stage of a loop ring, and FSDP2's of everything else.

    The stage's layers are gathered when the loop begins, unless one process holds them, and freed after its backward
    pass; matrices of products in the compute dtype, which the replay counts as rounded. Gradients add up unsharded until
    the step is over.
    """

    def __init__(self, config: RunConfig, layout: Layout, ledger: Ledger, gpu: bool) -> None:
        super().__init__(config, layout, ledger, gpu)
        self.stage = stage_parameters(config, layout)
        others = (p for p in self.parameters if not p.name.startswith("core.layers."))
        self.parameters = (*others, *self.stage)
        self.stage_ranks = layout.stage_ranks * layout.context
        self.stage_bytes = FLOAT32 * sum(p.local_size(layout) for p in self.stage)
        rounds = config.train.precision != "float32"
        kept = (p for p in self.stage if not (rounds and p.is_rounded_once))
        self.kept_bytes = FLOAT32 * sum(p.local_size(layout) for p in kept)
        self.is_gathered = False

    def _is_sharded(self, parameter: Parameter) -> bool:
        """Return True unless the parameter is a stage's, which FSDP2 does not know."""
        return not parameter.name.startswith("core.layers.")

    def hold_state(self) -> None:
        """Record this process's shards of weights and optimizer state in the ledger."""
        ranks = {True: self.ranks, False: self.stage_ranks}
        shards = ((p.name, p.padded_shard_size(self.layout, ranks[self._is_sharded(p)])) for p in self.parameters)
        self.hold_numbers(dict(shards))

    def begin_unit(self, unit: str, backward: bool = False) -> None:
        """Gather the unit unless it is held; with the core, this stage's layers."""
        super().begin_unit(unit, backward)
        if unit == "core" and not self.is_gathered and self.stage_ranks > 1:
            self.is_gathered = True
            self.ledger.hold(CORE, self.kept_bytes)

    def hold_gradients(self, size: float, looped: bool) -> None:
        """Record `size` bytes of gradients until they are reduced; the stage's add up in place, so no sums are held."""
        super().hold_gradients(size, looped=False)

    def end_backward(self, unit: str) -> None:
        """Free and reduce the unit's gradients; after the root's, the stage's."""
        super().end_backward(unit)
        if unit == "core" and self.is_gathered:
            self.is_gathered = False
            self.ledger.free(CORE, self.kept_bytes)
        if unit == ROOT and (self.last or self._reduces_every_micro_batch):
            biggest = max(FLOAT32 * p.local_size(self.layout) for p in self.stage)
            self.ledger.note_peak("reducing the stage", working_memory=biggest)
            self.ledger.free(UNREDUCED, self.stage_bytes)
            self.ledger.hold(GRADIENTS, self.stage_bytes / self.stage_ranks)


class ZeroWeights(Weights):
    """Weights under DeepSpeed in float32 mode: the optimizer steps a copy of them, and gradients pass through a bucket."""

    def __init__(self, config: RunConfig, layout: Layout, ledger: Ledger, gpu: bool) -> None:
        super().__init__(config, layout, ledger, gpu)
        self.stage, self.share = config.parallel.engine_kind.zero_stage, 1 / layout.world_size
        options = zero_options(config, layout)
        self.bucket_bytes = FLOAT32 * float(options["reduce_bucket_size"])
        self.buckets = 2 if self.stage < 3 and options["overlap_comm"] else 1
        self.ahead: dict[tuple[str, bool], float] = {}  # of later units, while a unit computes, forward or backward
        self.held_ahead = 0.0
        if self.stage == 3:
            for each in list_zero_gathers(config, layout):
                ahead = FLOAT32 * each.live - self.whole_bytes(each.unit) - self.whole_bytes(ROOT) * (each.unit != ROOT)
                key = each.unit, each.phase == BACKWARD
                self.ahead[key] = max(self.ahead.get(key, 0.0), ahead)

    def hold_state(self) -> None:
        """Record weights (whole below stage 3), optimizer shards, the bucket and, at stage 3, gradient shards."""
        every = FLOAT32 * sum(p.size for p in self.parameters)
        self.ledger.hold(WEIGHTS, every * (self.share if self.stage == 3 else 1))
        self.ledger.hold(OPTIMIZER, 3 * every * self.share)  # two moments and the copy of the weights
        self.ledger.hold(BUFFERS, self.buckets * self.bucket_bytes)
        if self.stage == 3:
            self.ledger.hold(GRADIENTS, every * self.share)

    def begin_unit(self, unit: str, backward: bool = False) -> None:
        """Record at stage 3 that the unit is gathered, and what is fetched ahead; below it, do nothing."""
        if self.stage == 3:
            self.ledger.hold(CORE if unit == "core" else OTHER, self.whole_bytes(unit))
            self.ledger.free(OTHER, self.held_ahead)
            self.held_ahead = self.ahead.get((unit, backward), 0.0)
            self.ledger.hold(OTHER, self.held_ahead)
            self.ledger.note_peak(f"gathering {unit}")

    def whole_bytes(self, unit: str) -> float:
        """Return the bytes of a unit's whole weights."""
        return FLOAT32 * sum(p.size for p in self.parameters_in(unit))

    def end_forward(self, unit: str) -> None:
        """Free the gathered unit at stage 3."""
        if self.stage == 3:
            self.ledger.free(CORE if unit == "core" else OTHER, self.whole_bytes(unit))

    def hold_gradients(self, size: float, looped: bool) -> None:
        """Record `size` bytes of gradients; from stage 2 on they are held only until their reduction."""
        if self.stage == 1:
            super().hold_gradients(size, looped)
        else:
            self.ledger.hold(UNREDUCED, size)

    def end_backward(self, unit: str) -> None:
        """Move a unit's gradients into the bucket; after the root's, reduce the bucket."""
        self.ledger.note_peak(f"backward, {unit}")
        self.end_forward(unit)
        if self.stage == 1:
            super().end_backward(unit)
            return
        self.ledger.free(UNREDUCED)
        if unit == ROOT:
            bucket = min(self.bucket_bytes, FLOAT32 * sum(p.size for p in self.parameters))
            self.ledger.note_peak("reducing", buffers=bucket * (1 + self.copies if self.stage == 3 else self.copies))
            self.end_forward(ROOT)
            if self.stage == 2 and self.first:
                self.ledger.hold(GRADIENTS, FLOAT32 * self.share * sum(p.size for p in self.parameters))


def make_weights(config: RunConfig, layout: Layout, ledger: Ledger, gpu: bool) -> Weights:
    """Return `Weights`, or its subclass for FSDP2 or DeepSpeed, by how the run's engine holds its weights."""
    engine = config.parallel.engine_kind
    kind: type[Weights] = ZeroWeights if engine.zero_stage else ShardedWeights if engine.shards_parameters else Weights
    return (RingWeights if layout.ring > 1 else kind)(config, layout, ledger, gpu)
