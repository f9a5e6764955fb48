"""Messages of a loop ring between ticks: states of the coming tick are waited for, what enters and leaves travels meanwhile.

A hop brings a stage what it computes next, which the stage before has only just computed, so nothing can hide it: that
would take twice as many sequences under way, each of them idle in every second tick (docs/loop_ring.md). What a sequence enters
with is there from the start, and is sent a tick before it is needed; what leaves is not needed before the pass ends.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

from megatron_rdt.parallel.ring_schedule import Message, RingSchedule

Tensors = list[Tensor]
Key = tuple[str, int]
"""Kind of a message, and its sequence."""


class RingMail:
    """Sends and receives the messages of this process in a pass of the ring.

    Every process posts its messages in one order, that of the schedule, since NCCL has no tags.

    Attributes:
        held: tensors to send, or that have arrived.
        shapes: of the tensors of each kind of message.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.stage = group, group.rank()
        self.held: dict[Key, Tensors] = {}
        self.shapes: dict[str, list[Any]] = {}
        self._posted: list[tuple[Any, Tensors]] = []  # work that travels while this process computes, and its tensors
        self._arriving: dict[Key, Tensors] = {}

    def begin(
        self, schedule: RingSchedule, shapes: dict[str, list[Any]], like: Tensor, backwards: bool = False
    ) -> None:
        """Begin a pass; what its first sequences enter with is in `held`.

        Args:
            schedule: of its laps.
            shapes: of the tensors of each kind of message.
            like: a tensor of the dtype and on the device of all messages.
            backwards: the pass runs the schedule in reverse, with every message in the other direction.
        """
        self.schedule, self.shapes, self.like, self.backwards = schedule, shapes, like, backwards
        self._step = -1 if backwards else 1
        self._inward, self._outward = ("leave", "enter") if backwards else ("enter", "leave")
        first = schedule.ticks + 1 if backwards else 0
        self._post(self._find(first, self._inward))

    def exchange(self, tick: int) -> None:
        """Wait for what a tick of the schedule needs, before it; let what enters next and what leaves now travel meanwhile."""
        self.end()
        self._post(self._find(tick, "hop"))
        self.end()
        self._post([*self._find(tick + self._step, self._inward), *self._find(tick, self._outward)])

    def end(self) -> None:
        """Wait for everything that travels."""
        for work, _ in self._posted:
            work.wait()
        self.held |= self._arriving
        self._posted, self._arriving = [], {}

    def _find(self, tick: int, kind: str) -> list[Message]:
        """List the messages of a kind before a tick."""
        return [message for message in self.schedule.messages_before(tick) if message.kind == kind]

    def _post(self, messages: Iterable[Message]) -> None:
        """Begin to send and receive this stage's part of the messages."""
        operations = []
        for message in messages:
            ends = message.source, message.target
            source, target = reversed(ends) if self.backwards else ends
            key = message.kind, message.sequence
            if self.stage not in ends or source == target:
                continue
            if self.stage == source:
                tensors = [tensor.contiguous() for tensor in self.held.pop(key)]
            else:
                tensors = self._arriving[key] = [self.like.new_empty(shape) for shape in self.shapes[message.kind]]
            function, peer = (dist.isend, target) if self.stage == source else (dist.irecv, source)
            tag = 2 * (message.sequence * len(self.shapes) + list(self.shapes).index(message.kind))
            operations += [
                P2POp(function, tensor, group=self.group, tag=tag + n, group_peer=peer)
                for n, tensor in enumerate(tensors)
            ]
        if operations:
            tensors = [operation.tensor for operation in operations]
            self._posted += [(work, tensors) for work in dist.batch_isend_irecv(operations)]
