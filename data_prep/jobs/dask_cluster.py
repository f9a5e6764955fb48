"""Dask, which runs steps on worker processes of this machine, or on those of a scheduler that is running elsewhere.

This is the only module that imports it. Dask distributes the steps, repeats those of a worker that was lost, and limits
memory. Results are files: nothing but names, options and counts goes through it.
"""

import contextlib
import inspect
import json
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import dask.config
from dask.task_spec import List, Task, TaskRef
from distributed import Client, Future, LocalCluster, Worker, get_worker
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker
from distributed.security import Security
from distributed.system import MEMORY_LIMIT

from data_prep.config import PrepConfig
from data_prep.jobs.fork_server import explain_failed_start, hold_back_signals
from data_prep.jobs.progress import Progress, count_step
from data_prep.jobs.steps import RunSteps, Step
from data_prep.jobs.working_directory import Job, hash_code
from megatron_rdt.environment import copy_environment, read_job_memory, usable_cores
from megatron_rdt.errors import ConfigError, DataError, LaunchError
from megatron_rdt.files import TEMPORARY_SUFFIX

SUBMITTED = 512  # steps that Dask knows at a time, so that its memory does not depend on their number
SHOW_EVERY_S = 1.0
CONNECT_S = 60.0  # for a scheduler that is just being started
WRITTEN_TRIES = 20  # to read the file of a scheduler
SHARED_S = 120.0  # longest time until a file of another machine is seen here: network file systems cache
LOOPBACK = "127.0.0.1"
# A producer of data waits at the scheduler until a worker is free; other tasks may be queued behind the one that a worker is
# doing. The argument is private to Dask: in a version without it, a step that waited there may be named for one that died.
WAIT_FOR_FREE_WORKER: dict[str, Any] = (
    {"_data_producer": True} if "_data_producer" in inspect.signature(Task).parameters else {}
)
LOCAL_SETTINGS: dict[str, Any] = {
    # That of this process, which forks them: Dask's own choices import its modules anew in each worker, or pandas here.
    "distributed.worker.multiprocessing-method": None,
    # Workers hold no data of Dask's, so there is nothing to spill, and waiting frees no memory: one that exceeds its share
    # is ended and its step repeated.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    # A worker has the step that it is doing and no other, so if it dies, that step is the one that counts as failed.
    "distributed.scheduler.worker-saturation": 1.0,
    # A step that ends its worker, as one does that needs too much memory, is not tried for ever.
    "distributed.scheduler.allowed-failures": 2,
    # A worker that dies is noticed by its closed connection; one that computes long without an answer is alive.
    "distributed.scheduler.worker-ttl": None,
    # Looking into workers for statistics costs time, and so does a malloc that returns every free page at once.
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.monitor-interval": "250ms",
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.diagnostics.nvml": False,
    "distributed.nanny.pre-spawn-environ": {},
    "distributed.worker.http.routes": [],
    "distributed.worker.use-file-locking": False,
}


class StoppedError(Exception):
    """Raised in a step that the scheduler does not wait for any more."""


@dataclass(frozen=True)
class _Place:
    """The folder and the code of the main process, which a worker must have too.

    Attributes:
        folder: the working directory of the process, for relative paths.
        code: versions and hashes that the result depends on.
    """

    folder: str
    code: dict[str, str]


# Of this worker: the preps that it was checked for, and the working directory of the step of each thread.
_entered: set[str] = set()
_busy: dict[int, str] = {}


def _enter_place(job: Job, place: _Place) -> None:
    """Change to the folder of the main process; raise RdtError where a worker sees other files or has other code."""
    host = os.uname().nodename
    if not job.root.is_dir() or not os.path.isdir(place.folder):
        raise ConfigError(
            f"{job.root if os.path.isdir(place.folder) else place.folder} does not exist on the worker {host}. Workers need "
            "the same paths: put --out on a file system that all machines share."
        )
    os.chdir(place.folder)
    key = f"{job.root} {job.identity}"
    if key in _entered:
        return
    here = hash_code(job.config)
    for name in sorted(here.keys() | place.code.keys()):
        if here.get(name) != place.code.get(name):
            raise ConfigError(
                f"the worker {host} has another {name} ({here.get(name)}) than `rdt prep` ({place.code.get(name)}). Start "
                "workers in the same environment."
            )
    _entered.add(key)


def _do_step(step: Step, job: Job, place: _Place, topic: str, needs: list[object]) -> tuple[int, int]:
    """Do a step in a worker unless it is done; return the bytes and documents that it reported.

    Args:
        step: the step.
        job: options and paths.
        place: see there.
        topic: Dask's topic of progress.
        needs: what the steps before it returned; Dask waits for them.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def tell(size: int, documents: int) -> None:
        """Send progress to the main process; stop if it has gone, failed, or has the step done elsewhere."""
        task = worker.state.tasks.get(key)
        if task is None or task.state != "executing":
            raise StoppedError
        worker.log_event(topic, [step.name, size, documents])

    _busy[threading.get_ident()] = str(job.root)
    try:
        _enter_place(job, place)
        # Dask repeats a step whose worker was lost, also one that was done by then.
        if job.is_done(step.record):
            return step.size, 0
        return count_step(step.function, (job, *step.arguments), tell)
    finally:
        del _busy[threading.get_ident()]


def _run_steps(client: Client, job: Job, steps: list[Step], progress: Progress) -> None:
    """Have the workers of a client do steps, the first ones first; raise what a step raised."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    topic = f"prep-{client.id}"
    client.subscribe_topic(topic, events.put)
    place = _Place(os.getcwd(), hash_code(job.config))
    running: dict[str, Future] = {}
    named: dict[str, Step] = {}
    left = iter(enumerate(steps))
    try:
        while True:
            for index, step in islice(left, SUBMITTED - len(running)):
                # Those that are not running are done: they come earlier among the steps.
                needs = List(*(TaskRef(running[name].key) for name in step.needs if name in running))
                key = f"{step.name}-{client.id}"
                task = Task(key, _do_step, step, job, place, topic, needs, **WAIT_FOR_FREE_WORKER)
                running[step.name] = client.get({key: task}, key, sync=False, priority=-index)
                named[key] = step
                running[step.name].add_done_callback(events.put)
            if not running:
                break
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=SHOW_EVERY_S)
                if isinstance(event, Future):
                    step = named.pop(str(event.key))
                    progress.count(step.name, *_take_result(event, step))
                    del running[step.name]
                elif event[1][0] in running:
                    progress.count(*event[1])
            progress.show()
        # What a step needed is removed when that step is done.
        needed = frozenset().union(*(step.needs for step in steps))
        for step in steps:
            if step.name not in needed:
                _await_record(job, step)
    finally:
        client.unsubscribe_topic(topic)
        client.cancel([*running.values()])


def _take_result(future: Future, step: Step) -> tuple[int, int]:
    """Return what a finished step returned; raise what it raised, or an error that tells how its workers were lost."""
    try:
        return future.result()
    except KilledWorker as error:
        raise DataError(
            f"{step.name} was given to {error.allowed_failures + 1} worker processes, and each one died: it was killed, "
            "probably because it took more than its share of the memory, or it crashed. Lower --workers, or free memory; if "
            "that does not help, halve --sources until the file is found, and report it."
        ) from None
    except FutureCancelledError:
        raise LaunchError(
            f"the connection to the scheduler was lost while {step.name} was to be done. Start the scheduler and its workers "
            "again, and then the same command: it continues."
        ) from None


def _await_record(job: Job, step: Step) -> None:
    """Wait until the record of a step that a worker has done is seen here; DataError if it never is."""
    deadline = time.monotonic() + SHARED_S
    while not job.is_done(step.record):
        if time.monotonic() >= deadline:
            raise DataError(
                f"a worker has done {step.name}, but {step.record} is not complete here. Put --out on a file system that all "
                "machines share."
            )
        time.sleep(0.1)


@contextlib.contextmanager
def open_cluster(config: PrepConfig, root: Path) -> Iterator[RunSteps]:
    """Yield a function that runs steps on the workers of `config.scheduler`, or on new ones of this machine.

    Args:
        config: the options.
        root: the working directory, in which workers of this machine keep their temporary files.

    Raises:
        LaunchError: no scheduler answers.
        DataError: workers cannot be started.
    """
    # What the user needs to know is raised as an error. Dask gives some of its loggers levels of their own.
    for name in ("distributed", "distributed.client", "distributed.gc", "tornado", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    start = _connect if config.scheduler else _start_workers
    with start(config, root) as client:
        yield lambda job, steps, progress: _run_steps(client, job, steps, progress)


@contextlib.contextmanager
def _start_workers(config: PrepConfig, root: Path) -> Iterator[Client]:
    """Yield a client of new worker processes that only this process reaches, and end them at once after the block."""
    address = f"{LOOPBACK}:{config.dashboard}"
    workers = config.workers or usable_cores()
    settings = dict(LOCAL_SETTINGS)
    if not config.dashboard:
        settings["distributed.scheduler.http.routes"] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        try:
            with hold_back_signals():
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        memory_limit=min(MEMORY_LIMIT, read_job_memory() or MEMORY_LIMIT) // workers,
                        host=LOOPBACK,
                        # Whoever can talk to Dask can run code here: only the holders of a key of this prep can.
                        protocol="tls",
                        security=Security.temporary(),
                        local_directory=str(root / f"workers{TEMPORARY_SUFFIX}"),
                        silence_logs=logging.CRITICAL,
                        env=copy_environment(),  # that of the process they are forked from may be older
                        dashboard_address=address if config.dashboard else None,
                        scheduler_kwargs={"dashboard": bool(config.dashboard), "dashboard_address": address},
                    )
                )
                stack.callback(_kill_workers, cluster)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        except (OSError, RuntimeError) as error:
            raise _explain_failed_start(error) from error
        if config.dashboard:
            print(f"dashboard: {cluster.dashboard_link}", flush=True)
        yield client


def _kill_workers(cluster: LocalCluster) -> None:
    """Kill the workers of a cluster: what they have done is in files, and what they are doing is not wanted."""
    for nanny in cluster.workers.values():
        nanny.close_gracefully()  # it is not to start another one
        if nanny.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)


def _explain_failed_start(error: BaseException) -> DataError:
    """Return an error that says why workers could not be started."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return explain_failed_start(cause)
    return DataError(
        "a worker process could not start; its messages above say why. A script that calls `prepare` must do so below "
        '`if __name__ == "__main__":`, because workers import it.'
    )


@contextlib.contextmanager
def _connect(config: PrepConfig, root: Path) -> Iterator[Client]:
    """Yield a client of the scheduler that `config.scheduler` names, when no worker is at work on `root` any more."""
    address, deadline = config.scheduler, time.monotonic() + CONNECT_S
    is_file = "://" not in address
    if is_file and not os.path.exists(address):
        print(f"waiting up to {CONNECT_S:.0f} s for {address}, the file of a scheduler", flush=True)
    while is_file and not os.path.exists(address):
        if time.monotonic() >= deadline:
            raise LaunchError(
                f"{address} does not exist. Start a scheduler with `dask scheduler --scheduler-file {address}`, or give its "
                "address, as in --scheduler tcp://host:8786."
            )
        time.sleep(0.1)
    if is_file:
        _check_scheduler_file(address)
    print(f"connecting to the scheduler {address}, for up to {CONNECT_S:.0f} s", flush=True)
    try:
        named = {"scheduler_file": address} if is_file else {"address": address}
        client = Client(**named, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise LaunchError(f"no scheduler answers at {address} ({error}). Start one with `dask scheduler`.") from None
    with client:
        if not client.nthreads():
            print(f"no worker is connected to {config.scheduler} yet: waiting for the first", flush=True)
        # A `rdt prep` that was killed may have left a step that somebody is still doing. It stops soon.
        while any(client.run(_is_busy, str(root), on_error="ignore").values()):  # a worker that dies is not busy
            time.sleep(0.2)
        yield client


def _check_scheduler_file(path: str) -> None:
    """Raise ConfigError unless a file is one that `dask scheduler --scheduler-file` wrote."""
    for _ in range(WRITTEN_TRIES):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if isinstance(json.loads(Path(path).read_bytes())["address"], str):
                return
        time.sleep(0.1)  # it may be just being written
    raise ConfigError(
        f"--scheduler {path} is not the file of a scheduler. Name the one of `dask scheduler --scheduler-file`."
    )


def _is_busy(root: str, dask_worker: Worker) -> bool:
    """Return True if a worker is doing a step in the working directory `root`."""
    return root in _busy.values()
