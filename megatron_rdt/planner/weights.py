"""Memory of weights, gradients and optimizer state on one process over a step, as each kind of engine holds them.

`memory.py` replays a step and calls these classes at its events; they enter in the ledger what is held and freed.
A *unit* is a group of parameters that is gathered together, see `parameters.py`.
"""

from collections.abc import Iterable

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.parameters import (
    ROOT,
    Parameter,
    core_units,
    list_parameters,
    list_units,
    moments_per_weight,
    piece_width,
)
from megatron_rdt.planner.recomputation import CheckpointingPolicy
from megatron_rdt.planner.shape import BFLOAT16, FLOAT32

WEIGHTS, OPTIMIZER, GRADIENTS, AVERAGE = "weights", "optimizer", "gradients", "average of the weights"
# Copies of the largest matrix in a step of Muon, of the largest parameter in one of AdamW with rounded moments.
MUON_COPIES, ROUNDING_COPIES = 4, 7
CORE, OTHER, BUFFERS = "gathered core", "other gathered units", "buffers"
UNREDUCED, SUMS = "unreduced gradients", "gradients being summed"


class Weights:
    """Weights that every process holds whole (engines single and ddp).

    Attributes:
        first, last: the current micro-batch is the first, or the last, of the step.
        summed: the core's gradients are sums over several iterations.
        pending: names of the parameters whose gradients the current backward pass has still to compute.
        largest_held: bytes of the largest parameter, as far as this process holds it.
        gpu: kernels are those of a GPU.
        copies: copies of a buffer that the backend makes to send it (gloo: one).
    """

    def __init__(self, config: RunConfig, layout: Layout, ledger: Ledger, gpu: bool) -> None:
        self.config, self.layout, self.ledger, self.parameters = config, layout, ledger, list_parameters(config.model)
        self.gpu, self.copies, self.largest_held = gpu, 0.0 if gpu else 1.0, 0.0
        self.first = self.last = self.summed = True
        self.pending: set[str] = set()
        self._part_sizes: dict[tuple[str, str], tuple[float, float]] = {}

    def parameters_in(self, unit: str) -> list[Parameter]:
        """Return the parameters of a unit."""
        return [p for p in self.parameters if p.unit == unit]

    def hold_state(self) -> None:
        """Record in the ledger the bytes held throughout the step: weights, optimizer state, DDP's buckets."""
        every = FLOAT32 * sum(p.local_size(self.layout) for p in self.parameters)
        self.hold_numbers({p.name: p.size for p in self.parameters})
        if self.config.parallel.engine_kind.many_processes:
            self.ledger.hold(BUFFERS, every)  # DDP's buckets

    def hold_numbers(self, numbers: dict[str, float]) -> None:
        """Record weights, optimizer state and the weights' average, given the numbers of each parameter on this process."""
        optimizer = self.config.optimizer
        every, self.largest_held = FLOAT32 * sum(numbers.values()), FLOAT32 * max(numbers.values())
        width = FLOAT32 if optimizer.state_dtype == "float32" else BFLOAT16
        state = width * sum(moments_per_weight(p, optimizer) * numbers[p.name] for p in self.parameters)
        self.ledger.hold(WEIGHTS, every)
        self.ledger.hold(OPTIMIZER, state)
        if optimizer.ema:
            self.ledger.hold(AVERAGE, every)

    def begin_micro_batch(self, first: bool, last: bool, summed: bool) -> None:
        """Set `first`, `last` and `summed` for a micro-batch that begins, and mark every gradient as pending."""
        self.first, self.last, self.summed = first, last, summed
        self.pending = {p.name for p in self.parameters}

    def begin_unit(self, unit: str, backward: bool = False) -> None:
        """Record that a unit is gathered as its forward or backward pass begins; no effect for whole weights."""

    def end_forward(self, unit: str) -> None:
        """Record that a gathered unit is freed after its forward pass; no effect for whole weights."""

    def gather_again(self, layer: int) -> None:
        """Record what the loop's backward pass gathers before a core layer computes again; no effect for whole weights."""

    def free_layer(self, layer: int) -> None:
        """Record that `gather_again` of a core layer is undone after its backward pass."""

    def add_gradients(self, *prefixes: str, summed: bool = False) -> None:
        """Record the gradients just computed: those of pending parameters whose names begin with one of `prefixes`.

        Args:
            prefixes: of parameters' names.
            summed: they are sums of their own, also where a single iteration carries gradient.
        """
        done = {name for name in self.pending if name.startswith(prefixes)}
        self.pending -= done
        size = FLOAT32 * sum(p.local_size(self.layout) for p in self.parameters if p.name in done)
        self.hold_gradients(size, looped=(summed or self.summed) and any(name.startswith("core.") for name in done))

    def hold_gradients(self, size: float, looped: bool) -> None:
        """Record `size` bytes of gradients; after the first micro-batch only `looped` ones, as temporary sums."""
        # Autograd adds to gradients that exist in place, but sums those of several iterations before it does.
        if self.first:
            self.ledger.hold(GRADIENTS, size)
        elif looped:
            self.ledger.hold(SUMS, size)

    def temporary_gradient_bytes(self, unit: str, part: str, again: bool = False, freed: float = 0.0) -> float:
        """Return the bytes of a layer part's new weight gradients until they are added to the sums.

        Args:
            unit: a layer.
            part: "attention" or "feedforward".
            again: an earlier iteration of the same backward pass has left a sum to add to.
            freed: bytes that are free before the gradients of routed experts are computed, but not those of shared ones.
        """
        if (unit, part) not in self._part_sizes:
            own = [p for p in self.parameters if p.name.startswith(f"{unit}.{part}")]
            sizes = [float(p.local_size(self.layout)) for p in own if not p.is_routed]
            stacked = FLOAT32 * sum(p.local_size(self.layout) for p in own if p.is_routed)
            self._part_sizes[unit, part] = stacked, max(sizes, default=0.0)
        routed, biggest = self._part_sizes[unit, part]
        if routed:  # a gradient per expert until all are computed, and one stack of them
            return max(routed * 4 / 3 - freed, FLOAT32 * biggest * self._count_new_gradients(again))
        rounding = 1.0 if self.config.train.precision == "bfloat16" else 0.0
        return FLOAT32 * biggest * ((1.0 if again or not self.first else 0.0) + rounding)

    def _count_new_gradients(self, again: bool) -> float:
        """Return how many float32 copies of the gradient of a shared expert's matrix exist beside the sum over iterations."""
        if self.config.train.precision == "float32":
            return 1.0 if again else 0.0
        product = 0.0 if self.gpu else BFLOAT16 / FLOAT32  # a GPU's product is in float32 at once
        in_place = self.config.parallel.core_gather == "once"  # the product adds to the sum itself
        return product + (1.0 if again and not in_place else 0.0)

    def end_backward(self, unit: str) -> None:
        """Note the peak after the core's backward pass and free the loop's sums; no effect for other units."""
        if unit == "core":
            self.ledger.note_peak("backward, the loop's gradients")
            self.ledger.free(SUMS)

    def step_optimizer(self) -> None:
        """Note the peak of the optimizer step, with its copies of the largest parameter; free the gradients."""
        optimizer, working = self.config.optimizer, 0.0
        if optimizer.state_dtype != "float32":
            working = ROUNDING_COPIES * self.largest_held
        if optimizer.name == "muon":
            working = max(working, MUON_COPIES * max(FLOAT32 * p.size for p in self.parameters))
        self.ledger.note_peak("the optimizer", working_memory=working)
        self.ledger.free(GRADIENTS)


class ShardedWeights(Weights):
    """Weights under FSDP2: units are gathered before their passes, and their gradients reduced after the backward pass.

    Attributes:
        ranks: processes that share a shard group.
        narrowing: bytes that a piece is gathered in over those of its gradients.
        pieces: gathered bytes of each piece of a core that is gathered in pieces.
        recomputes: the backward pass computes whole iterations again.
        gathered: units whose gathered weights are held.
        buffer, fetched: bytes that the last gather received, which FSDP2 holds until the next gather, and its unit.
        sending: bytes that the last reduction sent, held until the next reduction.
    """

    def __init__(self, config: RunConfig, layout: Layout, ledger: Ledger, gpu: bool) -> None:
        super().__init__(config, layout, ledger, gpu)
        self.ranks = layout.shard * layout.context
        self.gathered: set[str] = set()
        self._gathered_bytes: dict[str, float] = {}
        self.buffer, self.fetched = 0.0, ""
        self.sending = 0.0
        _, *pieces = core_units(config).values()
        self.narrowing = piece_width(config) / FLOAT32
        self.pieces = [self.narrowing * self.ranks * self.shard_bytes(group) for group in pieces]
        policy = CheckpointingPolicy(config.depth.checkpoint)
        self.recomputes = policy.recomputed_share > 0 and not policy.every_layer

    def hold_state(self) -> None:
        """Record this process's shards of weights and optimizer state in the ledger."""
        self.hold_numbers({p.name: p.padded_shard_size(self.layout, self.ranks) for p in self.parameters})

    def gathered_bytes(self, unit: str) -> float:
        """Return the bytes of a unit gathered at a time; of a core in pieces, the outer and the largest inner."""
        if unit not in self._gathered_bytes:
            outer, inner = self._unit_bytes(unit)
            self._gathered_bytes[unit] = outer + self.narrowing * inner
        return self._gathered_bytes[unit]

    def _unit_bytes(self, unit: str) -> tuple[float, float]:
        """Return the bytes in float32 of a unit and, for a core in pieces, of the largest of them; padded for gathers."""
        groups = core_units(self.config).values() if unit == "core" else [self.parameters_in(unit)]
        outer, *inner = (self.ranks * self.shard_bytes(group) for group in groups)
        return outer, max(inner, default=0.0)

    def gradient_bytes(self, unit: str) -> float:
        """Return the bytes of a unit's gradients before they are reduced."""
        return FLOAT32 * sum(p.local_size(self.layout) for p in self.parameters_in(unit) if self._is_sharded(p))

    def shard_bytes(self, parameters: Iterable[Parameter]) -> float:
        """Return the bytes of this process's shards of some parameters."""
        return FLOAT32 * sum(p.padded_shard_size(self.layout, self.ranks) for p in parameters if self._is_sharded(p))

    def _is_sharded(self, parameter: Parameter) -> bool:
        """Return True unless expert parallelism has dealt the parameter out already."""
        return not (self.layout.expert > 1 and parameter.is_routed)

    def begin_unit(self, unit: str, backward: bool = False) -> None:
        """Gather the unit unless it is held; in the backward pass, fetch the next one too while this one runs."""
        if unit not in self.gathered:
            size = self.gathered_bytes(unit)
            if unit != self.fetched:
                self._hold_gather_buffer(unit)
            self.ledger.hold(CORE if unit == "core" else OTHER, size)
            self.gathered.add(unit)
            self.ledger.note_peak(f"gathering {unit}")
        if backward and unit == self.fetched:  # its buffer has become the gathered weights
            self._hold_gather_buffer("")
        # FSDP2 prefetches in the backward pass: the next unit's buffer is held while this unit computes.
        if backward and unit == "core" and self.pieces:
            # Then the next piece's, unless there is one only, or all are gathered because an iteration is computed again.
            self._set_gather_buffer(max(self.pieces) if self._fetches_pieces else 0.0, "")
        elif backward and self.next_in_backward(unit) not in self.gathered:
            self._hold_gather_buffer(self.next_in_backward(unit))

    @property
    def _fetches_pieces(self) -> bool:
        """True if the next piece of the core is fetched while one computes in the backward pass."""
        return len(self.pieces) > 1 and not self.recomputes

    def gather_again(self, layer: int) -> None:
        """Gather the piece of the core that begins with a layer, copying it out of the buffer that it arrives in.

        Where an iteration is computed again, its pieces stay until their own backward passes. Otherwise each replaces the one
        before, which `gathered_bytes` counts, and has been fetched early if there are several.
        """
        if layer >= len(self.pieces):
            return
        piece = self.pieces[layer]
        if self.recomputes:
            self.ledger.hold(CORE, piece if layer else 0.0)
        self.ledger.note_peak("gathering the core again", buffers=piece * (not self._fetches_pieces))

    def free_layer(self, layer: int) -> None:
        """Free the piece that `gather_again` has added, the largest one stays counted; and what the last reduction sent."""
        if self.pieces:
            self.ledger.free(BUFFERS, self.sending)
            self.sending = 0.0
        if self.recomputes and 0 < layer < len(self.pieces):
            self.ledger.free(CORE, self.pieces[layer])

    def _hold_gather_buffer(self, unit: str) -> None:
        """Replace the recorded gather buffer by that of `unit`, "" for none, and note the peak."""
        self._set_gather_buffer(self.gathered_bytes(unit), unit)
        self.ledger.note_peak(f"gathering {unit}", buffers=self.copies * self.buffer)

    def _set_gather_buffer(self, size: float, unit: str) -> None:
        """Replace the recorded gather buffer by one of `size` bytes for `unit`."""
        self.ledger.free(BUFFERS, self.buffer)
        self.buffer, self.fetched = size, unit
        self.ledger.hold(BUFFERS, size)

    def next_in_backward(self, unit: str) -> str:
        """Return the unit whose backward pass comes next; after the first layer, that is the root."""
        order = [ROOT, *list_units(self.config.model), ROOT]
        return order[order.index(unit) - 1]

    def end_forward(self, unit: str) -> None:
        """Free the gathered weights, unless they are kept for the backward pass."""
        if self.config.parallel.reshard_after_forward:
            self._free_gathered(unit)

    def _free_gathered(self, unit: str) -> None:
        """Free the gathered weights of a unit."""
        self.gathered.discard(unit)
        self.ledger.free(CORE if unit == "core" else OTHER, self.gathered_bytes(unit))

    def hold_gradients(self, size: float, looped: bool) -> None:
        """Record `size` bytes of gradients until they are reduced; if some exist, only `looped` ones, as sums."""
        if self.first or self._reduces_every_micro_batch:
            self.ledger.hold(UNREDUCED, size)
        elif looped:
            self.ledger.hold(SUMS, size)

    @property
    def _reduces_every_micro_batch(self) -> bool:
        """True if gradients are reduced after every micro-batch, rather than once per step."""
        return self.config.parallel.reduce == "per_micro_batch"

    def end_backward(self, unit: str) -> None:
        """Free the gathered weights; reduce gradients to a shard in the last micro-batch, or in each if so set."""
        if unit == "core" and self.pieces:  # the last piece to go backward has fetched the next unit
            following = self.next_in_backward(unit)
            self._set_gather_buffer(self.gathered_bytes(following), following)
        sent, shard = sum(self._unit_bytes(unit)), self.shard_bytes(self.parameters_in(unit))
        self.ledger.note_peak(f"backward, {unit}")
        self.ledger.free(SUMS)
        self._free_gathered(unit)
        if not (self.last or self._reduces_every_micro_batch):
            return
        # FSDP2 copies the gradients into one buffer to send, and keeps it until the next reduction has begun.
        self.ledger.free(BUFFERS, self.sending)
        self.ledger.hold(BUFFERS, sent)
        self.sending = sent
        self.ledger.note_peak(f"reducing {unit}")
        self.ledger.free(UNREDUCED, self.gradient_bytes(unit))
        self.ledger.hold(GRADIENTS, shard)
        self.ledger.note_peak(f"reducing {unit}", buffers=self.copies * sent)
        if unit == ROOT:
            self.ledger.free(BUFFERS)
            self.buffer = self.sending = 0.0
