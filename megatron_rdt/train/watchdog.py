"""Watchdog: before a timeout ends a run that hangs, every rank writes where it is, and rank 0 says who keeps whom waiting.

A rank that hangs begins no collective, and those that wait for it begin none either. So each rank watches the counters of
its own flight recorder (torch's ring buffer of collectives, for NCCL and gloo), and they all notice at about the same
time, without a message. A rank that cannot even run this thread writes nothing, and is named for that.
"""

import contextlib
import faulthandler
import json
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_rdt.environment import leave_process
from megatron_rdt.errors import EXIT_HANG, TIMED_OUT, HangError
from megatron_rdt.files import write_bytes, write_text
from megatron_rdt.object_collectives import rank_and_world_size
from megatron_rdt.run_directory import HANG
from megatron_rdt.terminal import show_line

# Share of the timeout after which a rank without a new collective writes where it is; shares of the time until then
# between two looks, and for which rank 0 waits for the files of the others.
PATIENCE, LOOK, COLLECT = 0.8, 0.02, 0.1
LONGEST_PAUSE_S = 1.0  # between two looks
SHOWN_RANKS, SHOWN_GROUPS = 8, 6
# Seconds after the limit when a rank ends that is still in a collective: Gloo's end by themselves before.
EXTRA_S = {"gloo": 10.0, "nccl": 0.0}
VERDICT = "verdict.txt"  # rank 0's, of a pause that lasts
WAITS_FOR_MESSAGE = "object_collectives.py"
OWN_CODE = ("megatron_rdt", "launch")


def read_flight_recorder(entries: bool) -> dict[str, Any]:
    """Return torch's record of this process's collectives: counters in `pg_status` and, if asked, those under way."""
    from torch._C import _distributed_c10d as binding

    return json.loads(binding._dump_fr_trace_json(entries, True))  # type: ignore[attr-defined]


def dump_flight_recorder() -> bytes:
    """Return torch's record of this process's last collectives, pickled as torchfrtrace reads it.

    Gloo's lacks the groups, without which that program knows no collective (KeyError); they are added. It tells groups by their
    names, so collectives of the groups of hosts, which have none, are left out.
    """
    from torch._C import _distributed_c10d as binding

    record = pickle.loads(binding._dump_fr_trace())  # type: ignore[attr-defined]
    groups = {}
    for group in distributed_c10d._world.pg_config_info:
        ranks = group["ranks"] or list(range(dist.get_world_size()))
        groups[group["pg_name"]] = {"name": group["pg_name"], "desc": group["pg_desc"], "ranks": str(ranks)}
    groups |= {name: group for name, group in record["pg_config"].items() if name}
    entries = [entry for entry in record["entries"] if entry["process_group"][0] in groups]
    return pickle.dumps({**record, "pg_config": groups, "entries": entries}, protocol=2)


class Watchdog:
    """A context in which a thread of each rank notices that no collective begins or ends any more.

    Args:
        run_directory: `runs/<name>`; files go into `hang/` in it.
        read_timeout_s: returns the seconds that a collective may take now before the run ends: more in the first step.
        print_line: prints a line on rank 0.
    """

    def __init__(
        self, run_directory: Path, read_timeout_s: Callable[[], float], print_line: Callable[[str], None]
    ) -> None:
        self._folder, self._print_line = run_directory / HANG, print_line
        self._read_timeout_s = read_timeout_s
        self._rank, self._world_size = rank_and_world_size()
        self._has_reported = False  # and nothing has changed since
        self._main_thread = threading.get_ident()
        self._is_over = threading.Event()
        self._read: dict[int, str] = {}  # on rank 0: the summaries of an earlier pause, by rank
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        if isinstance(error, Exception) and is_timeout(error) and self._has_reported:
            raise HangError(self._explain_hang()) from error

    @property
    def _limit_s(self) -> float:
        """Seconds without a new collective after which to report."""
        return PATIENCE * self._read_timeout_s()

    def _watch(self) -> None:
        """Look at the counters again and again; when they have not changed for long, report, once until they do."""
        counters, changed = None, time.monotonic()
        extra_s = EXTRA_S.get(dist.get_backend(), max(EXTRA_S.values()))
        with contextlib.suppress(OSError):  # of an earlier start
            self._summary_file(self._rank).unlink(missing_ok=True)
            self._drop_verdict()
        while not self._is_over.wait(min(LOOK * self._limit_s, LONGEST_PAUSE_S)):
            now = read_flight_recorder(entries=False).get("pg_status")
            if now != counters:
                if self._has_reported:
                    self._drop_verdict()
                counters, changed, self._has_reported = now, time.monotonic(), False
                continue
            quiet_s = time.monotonic() - changed
            if counters and not self._has_reported and quiet_s > self._limit_s:
                self._has_reported = True
                self._report(quiet_s)
            elif self._has_reported and quiet_s > self._read_timeout_s() + extra_s and self._is_in_collective():
                # NCCL would end the process with a signal, from a thread of its own.
                show_line(f"error (rank {self._rank}): {self._explain_hang()}")
                leave_process(EXIT_HANG)

    def _is_in_collective(self) -> bool:
        """Return True if a collective is under way on this rank."""
        return bool(read_flight_recorder(entries=True)["entries"])

    def _drop_verdict(self) -> None:
        """Delete on rank 0 its text about an earlier pause, which has ended."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                (self._folder / VERDICT).unlink(missing_ok=True)

    def _report(self, quiet_s: float) -> None:
        """Write this rank's files; on rank 0, wait for those of the others, and print who waits for what."""
        try:
            self._write_files(quiet_s)
            if self._rank == 0:
                # Ranks notice it as far apart as their last collectives were.
                self._is_over.wait(COLLECT * self._limit_s)
                places = self._find_places()
                self._print_line(self._describe(quiet_s, places))
                write_text(self._folder / VERDICT, self._judge(places))
        except OSError as error:
            self._print_line(f"warning: {self._folder} cannot be written: {error}")

    def _write_files(self, quiet_s: float) -> None:
        """Write the stacks of all threads, the flight recorder's content, and a summary for rank 0."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / f"stacks-rank-{self._rank}.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # As torch's own tool (torchfrtrace) wants its files: a prefix and the rank.
        write_bytes(self._folder / f"collectives-rank-{self._rank}", dump_flight_recorder())
        frame, record = sys._current_frames().get(self._main_thread), read_flight_recorder(entries=True)
        summary = {
            "host": socket.gethostname(),
            "quiet_s": quiet_s,
            "begun": sum(int(group["last_enqueued_collective"]) for group in record["pg_status"].values()),
            "under_way": [_describe_collective(entry) for entry in record["entries"]],
            "at": "" if frame is None else _describe_place(frame),
        }
        write_text(self._summary_file(self._rank), json.dumps(summary))

    def _summary_file(self, rank: int) -> Path:
        """Path of the file in which a rank says where it is."""
        return self._folder / f"rank-{rank}.json"

    def _find_places(self) -> list[tuple[str, str]]:
        """Return names of ranks, and a text of where they are, for each place that some are at.

        First come those that have begun the fewest collectives. The others wait for these: some rank has to begin what they
        have begun.
        """
        places: dict[tuple[int, str], list[str]] = {}
        for rank in range(self._world_size):
            file = self._summary_file(rank)
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            is_new = text != self._read.get(rank, "")  # no clock tells: those of hosts may differ
            self._read[rank] = text
            summary: dict[str, Any] = json.loads(text) if is_new else {}
            if not is_new:
                place = (-1, "wrote nothing: it has ended, hangs in a library, or sees another disk")
                name = str(rank)
            else:
                last = f"the last is {summary['under_way'][-1]}" if summary["under_way"] else "none is under way"
                begun = summary["begun"]
                place = (begun, f"has begun {begun} collectives, {last}; it is at {summary['at']}")
                name = f"{rank} on {summary['host']}"
            places.setdefault(place, []).append(name)
        # In a save nobody begins a collective: ranks wait for the messages of one that hangs.
        in_order = sorted(
            places.items(), key=lambda place: (place[0][0], WAITS_FOR_MESSAGE in place[0][1], place[0][1])
        )
        return [(_name_ranks(names), text) for (_, text), names in in_order]

    def _describe(self, quiet_s: float, places: list[tuple[str, str]]) -> str:
        """Return the text for the console, given how long there was no collective, and who is where."""
        lines = [
            f"warning: no rank has begun or ended a collective for {quiet_s:.0f} s, of the {self._read_timeout_s():g} s that "
            f"one may take. Stacks of all threads and the collectives of each rank are in {self._folder}. The first of these "
            "ranks keep the others waiting:"
        ]
        return "\n".join([*lines, *(f"  {names} {text}" for names, text in places[:SHOWN_GROUPS])])

    def _judge(self, places: list[tuple[str, str]]) -> str:
        """Return a sentence on who hangs, and where the others wait for it."""
        (names, text), (others, wait) = places[0], places[-1]
        waiting = f" {others} {wait}." if len(places) > 1 else ""
        return (
            f"{names} kept the others waiting for more than the {self._read_timeout_s():g} s that a collective may take: it "
            f"{text}.{waiting}"
        )

    def _explain_hang(self) -> str:
        """Return the text of the error that ends the run, the same on all ranks."""
        try:
            verdict = (self._folder / VERDICT).read_text(encoding="utf-8")
        except OSError:  # or it sees another disk
            verdict = self._judge([("rank 0", "did not say who hangs: it is gone or hangs itself")])
        return f"{verdict} More is in {self._folder}. Continue with --resume auto; leave out a node that hangs again."


def is_timeout(error: BaseException) -> bool:
    """Return True for an error of Gloo, NCCL or our own messages that says that another rank did not come in time."""
    is_library_error = isinstance(error, RuntimeError) and any(sign in str(error) for sign in TIMED_OUT)
    return is_library_error or isinstance(error, HangError)


def _name_ranks(names: list[str]) -> str:
    """Return the text that names some ranks, such as `rank 1 on node3, 2 on node3 and 30 more`."""
    more = f" and {len(names) - SHOWN_RANKS} more" if len(names) > SHOWN_RANKS else ""
    return f"rank {', '.join(names[:SHOWN_RANKS])}{more}"


def _describe_collective(entry: dict[str, Any]) -> str:
    """Return the text of a collective under way: its name, shapes, number and group."""
    shapes = ", ".join("x".join(map(str, shape)) or "()" for shape in entry["input_sizes"])
    group = entry["process_group"][1] or entry["process_group"][0]
    return f"{entry['profiling_name']} of {shapes}, number {entry['collective_seq_id']} of {group}"


def _describe_place(frame: FrameType) -> str:
    """Return file, line and function of the innermost call of our own code, or of any code if there is none."""
    stack = traceback.extract_stack(frame)
    own = [call for call in stack if set(Path(call.filename).parts) & set(OWN_CODE)] or stack
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}"
