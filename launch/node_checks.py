"""Checks of the nodes of a job before a run: one process on each looks at its node, and rank 0 judges all of them.

They meet at a store of torch.distributed that rank 0 serves, and tell each other facts through it, so that a node that is not
there, or is late, can be named; collectives come last.
"""

import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rdt.environment import node_name, read_meeting_point
from megatron_rdt.errors import LaunchError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

GIB = 1 << 30
CLOCK_ROUNDS = 3
BYTES = {"gloo": 4 << 20, "nccl": 256 << 20}  # of the tensor that is reduced
REPEATS = 3  # that are measured, after one that is not
SEEN_WITHIN_S = 15.0  # a network file system may show a new file late
POLL_S = 0.2
PROBES = ".preflight"  # below the run's folder


@dataclass
class NodeFacts:
    """A node as the process on it sees it.

    Attributes:
        rank, host: of the process.
        devices: kind of each GPU; empty for a node without.
        free_share: smallest share of a GPU's memory that is free; 1 without GPUs.
        free_gib: space of the disk of the run's folder.
        clock_s: its clock minus that of rank 0, and the time of a message.
        unseen: ranks whose files in the run's folder it does not see.
        bandwidths: gigabytes per second: of an all-reduce of all nodes under "all", of messages under the other's rank.
        problems: sentences.
    """

    rank: int
    host: str
    devices: list[str] = field(default_factory=list)
    free_share: float = 1.0
    free_gib: float = math.inf
    clock_s: float = 0.0
    unseen: list[int] = field(default_factory=list)
    bandwidths: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def look_at_node(rank: int, folder: Path) -> NodeFacts:
    """Return what a process sees of its node alone; `folder`, the run's, is made if it is not there."""
    import torch

    facts = NodeFacts(rank, node_name())
    for index in range(torch.cuda.device_count()):
        facts.devices.append(torch.cuda.get_device_name(index))
        try:
            free, total = torch.cuda.mem_get_info(index)
            facts.free_share = min(facts.free_share, free / total)
        except RuntimeError as error:
            facts.problems.append(f"GPU {index} cannot be used ({str(error).splitlines()[0]})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts.free_gib = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        facts.problems.append(f"{folder} cannot be used ({error.strerror})")
    return facts


class Meeting:
    """The exchange of facts between the processes, one per node; unlike `StoreMessages` it goes on without those that are late.

    Args:
        rank, size: of this process, and their number.
        folder: of the run.
        timeout_s: for a node to arrive, and for a collective.
    """

    def __init__(self, rank: int, size: int, folder: Path, timeout_s: float) -> None:
        from megatron_rdt.parallel.process_group import open_store

        self.rank, self.size, self.folder, self.timeout_s = rank, size, folder / PROBES, timeout_s
        limit = timedelta(seconds=timeout_s)
        try:
            self.store: Store = open_store(rank, world_size=size, timeout=limit, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:  # torch's errors of the connection are RuntimeErrors
            host, port = read_meeting_point()
            raise LaunchError(
                f"{node_name()}, rank {rank}, does not reach rank 0 at {host}:{port} within {timeout_s:g} s "
                f"({str(error).splitlines()[0]}). Check the network between them, and that rank 0 was started."
            ) from None

    def _wait_for(self, stage: str, ranks: Iterable[int]) -> list[int]:
        """Return on rank 0 those of these ranks that have not set their key of a stage when the time is over."""
        missing, deadline = [], time.monotonic() + self.timeout_s
        for rank in ranks:
            left = max(deadline - time.monotonic(), POLL_S)
            try:
                self.store.wait([f"{stage}/{rank}"], timedelta(seconds=left))
            except RuntimeError:
                missing.append(rank)
        return missing

    def _tell(self, stage: str, value: str) -> str:
        """Set on rank 0 the value of a stage, and return on every rank what it was set to."""
        if self.rank == 0:
            self.store.set(stage, value)
        else:  # rank 0 may wait for others as long as `timeout_s` before it tells
            self.store.wait([stage], timedelta(seconds=2 * self.timeout_s))
        return self.store.get(stage).decode()

    def gather(self, facts: NodeFacts, limit_gb: float) -> tuple[list[NodeFacts], list[int]]:
        """Add to this rank's facts what needs the others; return on rank 0 those of all, and the ranks that gave none.

        Args:
            facts: from `look_at_node`.
            limit_gb: bandwidth below which pairs of nodes are measured too.
        """
        token = self._tell("token", uuid.uuid4().hex)
        self._write_probe(facts, token)
        self.store.set(f"here/{self.rank}", "")
        missing = self._wait_for("here", range(self.size)) if self.rank == 0 else []
        if self._tell("go", "no" if missing else "yes") == "yes":
            self._compare_clocks(facts)
            self._look_for_probes(facts, token)
            try:
                self._measure(facts, limit_gb)
            except (RuntimeError, ValueError) as error:
                facts.problems.append(f"an all-reduce failed ({str(error).splitlines()[0]})")
        self.store.set(f"facts/{self.rank}", json.dumps(asdict(facts)))
        if self.rank:
            self._wait_until_read()
            return [facts], []
        missing += self._wait_for("facts", [rank for rank in range(self.size) if rank not in missing])
        known = [json.loads(self.store.get(f"facts/{rank}")) for rank in range(self.size) if rank not in missing]
        self._remove_probes()
        self.store.set("end", "")
        time.sleep(POLL_S)  # the others read it before the store ends with this process
        return [NodeFacts(**each) for each in known], sorted(missing)

    def _wait_until_read(self) -> None:
        """Wait until rank 0 has read the facts, or is gone."""
        try:
            self.store.wait(["end"], timedelta(seconds=2 * self.timeout_s))
        except RuntimeError:
            return

    def _write_probe(self, facts: NodeFacts, token: str) -> None:
        """Write this rank's file into the run's folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / str(self.rank)).write_text(token, encoding="utf-8")
        except OSError as error:
            facts.problems.append(f"{self.folder} cannot be written ({error.strerror})")

    def _look_for_probes(self, facts: NodeFacts, token: str) -> None:
        """Note the ranks whose files do not show up: rank 0 looks for all, another for rank 0's and for the next one's."""
        wanted = set(range(self.size)) if self.rank == 0 else {0, (self.rank + 1) % self.size}
        deadline = time.monotonic() + min(SEEN_WITHIN_S, self.timeout_s / 2)
        while wanted:
            wanted = {rank for rank in wanted if not self._has_token(rank, token)}
            if time.monotonic() > deadline:
                break
            if wanted:
                time.sleep(POLL_S)
        facts.unseen = sorted(wanted)

    def _has_token(self, rank: int, token: str) -> bool:
        """Return True if the file of a rank is there with this run's text."""
        try:
            return (self.folder / str(rank)).read_text(encoding="utf-8") == token
        except (OSError, UnicodeDecodeError):
            return False

    def _remove_probes(self) -> None:
        """Remove the files, and their folder; where something else is in it, that stays."""
        for rank in range(self.size):
            (self.folder / str(rank)).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return

    def _compare_clocks(self, facts: NodeFacts) -> None:
        """Note the difference between this clock and that of rank 0; the shortest message of some counts."""
        differences = []
        for number in range(CLOCK_ROUNDS):
            self.store.set(f"ready{number}/{self.rank}", "")
            if self.rank == 0:
                self._wait_for(f"ready{number}", range(self.size))
            sent = self._tell(f"now{number}", repr(time.time()))
            differences.append(time.time() - float(sent))
        facts.clock_s = min(differences, key=abs)

    def _measure(self, facts: NodeFacts, limit_gb: float) -> None:
        """Note the bandwidth of an all-reduce over all nodes and, where it is too small, over pairs of them."""
        import torch.distributed as dist
        from torch.distributed import PrefixStore

        backend = "nccl" if facts.devices else "gloo"
        limit = timedelta(seconds=self.timeout_s)
        store = PrefixStore("collectives", self.store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        facts.bandwidths["all"] = _time_all_reduce(backend, self.size)
        if self._tell("pairs", "yes" if facts.bandwidths["all"] < limit_gb else "no") == "no":
            return
        for shift in (0, 1):
            other = self.rank + (1 if (self.rank - shift) % 2 == 0 else -1)
            if 0 <= other < self.size:
                facts.bandwidths[str(other)] = _time_messages(backend, other, self.rank < other)


def _make_tensor(backend: str) -> "torch.Tensor":
    """Return the tensor that is sent."""
    import torch

    return torch.ones(BYTES[backend] // 4, device="cuda" if backend == "nccl" else "cpu")


def _time_shortest(send: Callable[[], None], tensor: "torch.Tensor") -> float:
    """Return the seconds of the fastest of some calls of `send`, after one that is not measured."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        send()
        tensor[0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _time_all_reduce(backend: str, size: int) -> float:
    """Return the gigabytes per second that each of `size` processes sends in an all-reduce."""
    import torch.distributed as dist

    tensor = _make_tensor(backend)
    return 2 * (size - 1) / size * BYTES[backend] / _time_shortest(lambda: dist.all_reduce(tensor), tensor) / 1e9


def _time_messages(backend: str, other: int, begins: bool) -> float:
    """Return the gigabytes per second of messages to another rank and back."""
    import torch.distributed as dist

    tensor = _make_tensor(backend)

    def exchange() -> None:
        for sends in (begins, not begins):
            if sends:
                dist.send(tensor, other)
            else:
                dist.recv(tensor, other)

    return 2 * BYTES[backend] / _time_shortest(exchange, tensor) / 1e9
