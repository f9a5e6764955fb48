"""Weights, gradients and optimizer state of one process over a step, as each engine holds and gathers them."""

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.parameters import FLOAT32, ROOT, Parameter, core_units, moments, units_of

WEIGHTS, OPTIMIZER, GRADIENTS = "weights", "optimizer", "gradients"
ZERO_BUCKET = 500_000_000  # numbers, DeepSpeed's own default
CORE, OTHER, BUFFERS = "gathered core", "other gathered units", "buffers"
UNREDUCED, SUMS = "unreduced gradients", "gradients being summed"


class Weights:
    """Unsharded: every process has all (engines single and ddp)."""

    def __init__(
        self, config: RunConfig, layout: Layout, parameters: tuple[Parameter, ...], ledger: Ledger, gpu: bool
    ) -> None:
        self.config, self.layout, self.parameters, self.ledger = config, layout, parameters, ledger
        self.first = self.last = self.summed = True
        self.pending: set[str] = set()

    def size(self, prefix: str) -> float:
        """Bytes of the parameters whose names begin so, once gathered."""
        return FLOAT32 * sum(p.local(self.layout) for p in self.parameters if p.name.startswith(prefix))

    def unit(self, unit: str) -> list[Parameter]:
        """Parameters of a unit."""
        return [p for p in self.parameters if p.unit == unit]

    def start(self) -> None:
        """What is held all the time."""
        every = FLOAT32 * sum(p.local(self.layout) for p in self.parameters)
        state = FLOAT32 * sum(moments(p, self.config.optimizer) * p.size for p in self.parameters)
        self.ledger.hold(WEIGHTS, every)
        self.ledger.hold(OPTIMIZER, state)
        if self.config.parallel.engine_kind.many_processes:
            self.ledger.hold(BUFFERS, every)  # DDP's buckets

    def begin(self, first: bool, last: bool, summed: bool) -> None:
        """A micro-batch begins; `summed` says whether the core's gradients are sums over iterations."""
        self.first, self.last, self.summed = first, last, summed
        self.pending = {p.name for p in self.parameters}

    def before(self, unit: str, backward: bool = False) -> None:
        """A unit's pass begins."""

    def after(self, unit: str) -> None:
        """A unit's forward pass has ended."""

    def gradient(self, *prefixes: str) -> None:
        """The gradients of the parameters whose names begin so are there."""
        done = {name for name in self.pending if name.startswith(prefixes)}
        self.pending -= done
        size = FLOAT32 * sum(p.local(self.layout) for p in self.parameters if p.name in done)
        self.appear(size, looped=self.summed and any(name.startswith("core.") for name in done))

    def appear(self, size: float, looped: bool) -> None:
        """Gradients of `size` bytes are there; those of the loop are summed before they are added to earlier ones."""
        if self.first:
            self.ledger.hold(GRADIENTS, size)
        elif looped:
            self.ledger.hold(SUMS, size)

    def largest(self, unit: str, part: str, again: bool = False) -> float:
        """Bytes of the weight gradients that are on their way in a part, beside what holds their sum."""
        own = [p for p in self.parameters if p.name.startswith(f"{unit}.{part}")]
        routed = FLOAT32 * sum(p.local(self.layout) for p in own if p.routed)
        if routed:  # each expert's own until all are there, and one stack of them
            return routed * 4 / 3
        biggest = max((p.local(self.layout) for p in own), default=0)
        rounding = 1.0 if self.config.train.precision == "bfloat16" else 0.0
        return FLOAT32 * biggest * ((1.0 if again or not self.first else 0.0) + rounding)

    def reduce(self, unit: str) -> None:
        """A unit's backward pass has ended."""
        if unit == "core":
            self.ledger.look("backward, the loop's gradients")
            self.ledger.free(SUMS)

    def finish(self) -> None:
        """Clip and step."""
        biggest = max(FLOAT32 * p.size for p in self.parameters)
        muon = self.config.optimizer.name == "muon"
        self.ledger.look("the optimizer", working_memory=4 * biggest if muon else 0.0)
        self.ledger.free(GRADIENTS)


class ShardedWeights(Weights):
    """FSDP2: units are gathered before their passes and reduced after their backward pass."""

    def __init__(
        self, config: RunConfig, layout: Layout, parameters: tuple[Parameter, ...], ledger: Ledger, gpu: bool
    ) -> None:
        super().__init__(config, layout, parameters, ledger, gpu)
        self.ranks = layout.shard * layout.context
        self.gathered: set[str] = set()
        self._at_once: dict[str, float] = {}
        self.buffer, self.fetched = 0.0, ""  # what the last gather received, held until the next, and whose
        self.sending = 0.0  # what the last reduction sent, held until the next
        self.copies = 0.0 if gpu else 1.0  # gloo copies what it sends

    def start(self) -> None:
        """Shards."""
        shards = {p.name: FLOAT32 * p.padded_shard(self.layout, self.ranks) for p in self.parameters}
        self.ledger.hold(WEIGHTS, sum(shards.values()))
        self.ledger.hold(OPTIMIZER, sum(moments(p, self.config.optimizer) * shards[p.name] for p in self.parameters))

    def at_once(self, unit: str) -> float:
        """Bytes of a unit that are gathered at a time; of a core of several units, the outer and the largest inner one."""
        if unit not in self._at_once:
            self._at_once[unit] = self._gathered(unit)
        return self._at_once[unit]

    def _gathered(self, unit: str) -> float:
        if unit != "core" or self.config.parallel.core_gather == "once":
            return self.whole(unit)
        outer, *inner = (
            FLOAT32 * self.ranks * sum(p.padded_shard(self.layout, self.ranks) for p in group if not self._stays(p))
            for group in core_units(self.config).values()
        )
        return outer + max(inner)

    def whole(self, unit: str) -> float:
        """Bytes of a unit, gathered."""
        return FLOAT32 * sum(
            self.ranks * p.padded_shard(self.layout, self.ranks) for p in self.unit(unit) if not self._stays(p)
        )

    def size_of_unit(self, unit: str) -> float:
        """Bytes of a unit's gradients before they are reduced."""
        return FLOAT32 * sum(p.local(self.layout) for p in self.unit(unit) if not self._stays(p))

    def shard(self, unit: str) -> float:
        """Bytes of a process's shard of a unit."""
        return FLOAT32 * sum(p.padded_shard(self.layout, self.ranks) for p in self.unit(unit) if not self._stays(p))

    def _stays(self, parameter: Parameter) -> bool:
        return self.layout.expert > 1 and parameter.routed

    def before(self, unit: str, backward: bool = False) -> None:
        """Gather it, in the backward pass before it is needed: while the unit that comes before it runs."""
        if unit not in self.gathered:
            size = self.at_once(unit)
            if unit != self.fetched:
                self._receive(unit)
            self.ledger.hold(CORE if unit == "core" else OTHER, size)
            self.gathered.add(unit)
            self.ledger.look(f"gathering {unit}")
        if backward and unit == self.fetched:
            self._receive("")
        if backward and self.following(unit) not in self.gathered:
            self._receive(self.following(unit))

    def _receive(self, unit: str) -> None:
        """Make the buffer of a gather in place of the last one's; "" makes none."""
        self.ledger.free(BUFFERS, self.buffer)
        self.buffer, self.fetched = self.at_once(unit), unit
        self.ledger.hold(BUFFERS, self.buffer)
        self.ledger.look(f"gathering {unit}", buffers=self.copies * self.buffer)

    def following(self, unit: str) -> str:
        """The unit whose backward pass comes next; after the first layer's the root's."""
        order = [ROOT, *units_of(self.config.model), ROOT]
        return order[order.index(unit) - 1]

    def after(self, unit: str) -> None:
        """Free the gathered weights, unless they are kept for the backward pass."""
        if self.config.parallel.reshard_after_forward:
            self._free(unit)

    def _free(self, unit: str) -> None:
        self.gathered.discard(unit)
        self.ledger.free(CORE if unit == "core" else OTHER, self.at_once(unit))

    def appear(self, size: float, looped: bool) -> None:
        """Unsharded gradients."""
        if self.first or self._reduces_always:
            self.ledger.hold(UNREDUCED, size)
        elif looped:
            self.ledger.hold(SUMS, size)

    @property
    def _reduces_always(self) -> bool:
        return self.config.parallel.reduce == "per_micro_batch"

    def reduce(self, unit: str) -> None:
        """Free the gathered weights; send the gradients off."""
        sent, shard = self.at_once(unit), self.shard(unit)
        self.ledger.look(f"backward, {unit}")
        self.ledger.free(SUMS)
        self._free(unit)
        if not (self.last or self._reduces_always):
            return
        self.ledger.free(BUFFERS, self.sending)
        self.ledger.hold(BUFFERS, sent)
        self.sending = sent
        self.ledger.look(f"reducing {unit}")
        self.ledger.free(UNREDUCED, self.size_of_unit(unit))
        self.ledger.hold(GRADIENTS, shard)
        self.ledger.look(f"reducing {unit}", buffers=self.copies * sent)
        if unit == ROOT:
            self.ledger.free(BUFFERS)
            self.buffer = self.sending = 0.0


class ZeroWeights(Weights):
    """DeepSpeed in its float32 mode: a copy of the weights that the optimizer steps, and a bucket of fixed size."""

    def __init__(
        self, config: RunConfig, layout: Layout, parameters: tuple[Parameter, ...], ledger: Ledger, gpu: bool
    ) -> None:
        super().__init__(config, layout, parameters, ledger, gpu)
        self.stage, self.share = config.parallel.engine_kind.zero_stage, 1 / layout.world_size
        self.copies = 0.0 if gpu else 1.0

    def start(self) -> None:
        """Shards; whole weights below stage 3."""
        every = FLOAT32 * sum(p.size for p in self.parameters)
        self.ledger.hold(WEIGHTS, every * (self.share if self.stage == 3 else 1))
        self.ledger.hold(OPTIMIZER, 3 * every * self.share)
        self.ledger.hold(BUFFERS, FLOAT32 * ZERO_BUCKET)
        if self.stage == 3:
            self.ledger.hold(GRADIENTS, every * self.share)

    def before(self, unit: str, backward: bool = False) -> None:
        """Stage 3 gathers it."""
        if self.stage == 3:
            self.ledger.hold(CORE if unit == "core" else OTHER, self.whole(unit))
            self.ledger.look(f"gathering {unit}")

    def whole(self, unit: str) -> float:
        """Bytes of a unit."""
        return FLOAT32 * sum(p.size for p in self.unit(unit))

    def after(self, unit: str) -> None:
        """Stage 3 frees it."""
        if self.stage == 3:
            self.ledger.free(CORE if unit == "core" else OTHER, self.whole(unit))

    def appear(self, size: float, looped: bool) -> None:
        """Gradients; from stage 2 on they wait for their reduction only."""
        if self.stage == 1:
            super().appear(size, looped)
        else:
            self.ledger.hold(UNREDUCED, size)

    def reduce(self, unit: str) -> None:
        """Into the bucket; what has been in it is reduced at the end."""
        self.ledger.look(f"backward, {unit}")
        self.after(unit)
        if self.stage == 1:
            super().reduce(unit)
            return
        self.ledger.free(UNREDUCED)
        if unit == ROOT:
            bucket = min(FLOAT32 * ZERO_BUCKET, FLOAT32 * sum(p.size for p in self.parameters))
            self.ledger.look("reducing", buffers=bucket * (1 + self.copies if self.stage == 3 else self.copies))
            self.after(ROOT)
            if self.stage == 2 and self.first:
                self.ledger.hold(GRADIENTS, FLOAT32 * self.share * sum(p.size for p in self.parameters))


def make_weights(
    config: RunConfig, layout: Layout, parameters: tuple[Parameter, ...], ledger: Ledger, gpu: bool
) -> Weights:
    """What the run's engine does with its weights."""
    engine = config.parallel.engine_kind
    kind = ZeroWeights if engine.zero_stage else ShardedWeights if engine.shards_parameters else Weights
    return kind(config, layout, parameters, ledger, gpu)
