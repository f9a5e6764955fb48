"""Read and set environment variables, here only; count cores, silence libraries, end the process."""

import contextlib
import ipaddress
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_rdt.errors import ConfigError, LaunchError
from megatron_rdt.terminal import flush_output

DEFAULT_MASTER = ("127.0.0.1", "29500")
ERROR_FILE = "RDT_ERROR_FILE"
THREADS = "OMP_NUM_THREADS"
SAFE_PATH = "PYTHONSAFEPATH"
RECORDED_COLLECTIVES = "2000"  # those of some steps; torch keeps them in a ring
# PyTorch's switches of what `torch.load` may unpickle: the first wins over its callers; both together are an error.
WEIGHTS_ONLY, NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# PyTorch's settings for the memory of a GPU; it reads the second one if only that is set.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# NCCL sums along rings and trees in an order that the machines' arrangement decides. Switches that sum (NVLS, CollNet) take
# what comes first, and the choice among algorithms and protocols, which cut data differently, may follow measured speeds.
DETERMINISTIC_LIBRARIES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "ring;allreduce:tree",
    "NCCL_PROTO": "simple",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_COLLNET_ENABLE": "0",
}


@dataclass(frozen=True)
class ProcessInfo:
    """Ranks and launcher of this process.

    Attributes:
        rank, world_size: its number among all processes of the run, and their count.
        local_rank, local_world_size: its number among the processes of this node, and their count.
        launcher: program that started it: "torch" (torchrun, deepspeed, our own), "slurm" (srun), or "none".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"


def read_process_info() -> ProcessInfo:
    """Read ranks from the variables of torchrun and DeepSpeed, else from srun's; without either, return rank 0 of 1.

    Raises:
        LaunchError: a variable is missing or is not a number, or a rank is not below the number of processes.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _read_number("WORLD_SIZE")
        local_world = _read_number(next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(n)), "WORLD_SIZE"))
        local_rank = _read_number("LOCAL_RANK") if "LOCAL_RANK" in env else 0
        _check_rank("RANK", _read_number("RANK"), world)
        _check_rank("LOCAL_RANK", local_rank, local_world)
        return ProcessInfo(_read_number("RANK"), world, local_rank, local_world, "torch")
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        tasks = _read_number("SLURM_NTASKS")
        local_world = int(env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split("(")[0].split(",")[0])
        return ProcessInfo(_read_number("SLURM_PROCID"), tasks, _read_number("SLURM_LOCALID"), local_world, "slurm")
    return ProcessInfo()


def is_first_rank() -> bool:
    """Return True unless a launcher's variables say that this is another rank than 0; nothing is checked."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _read_number(name: str) -> int:
    """Read a variable that must be a number; raise LaunchError if it is not."""
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise LaunchError(
            f"the environment variable {name} is {value!r}, it must be a number. Start the script with torchrun, "
            "deepspeed, srun or rdt train, which set it; or unset RANK and WORLD_SIZE to run one process."
        )
    return int(value)


def _check_rank(name: str, rank: int, processes: int) -> None:
    """Raise LaunchError unless `rank`, which the variable `name` holds, is one of so many processes."""
    if rank >= processes:
        count = "is 1 process" if processes == 1 else f"are {processes} processes"
        raise LaunchError(
            f"the environment variable {name} is {rank}, but there {count}. Start the script with torchrun, deepspeed, "
            "srun or rdt train, which set it; or unset RANK, WORLD_SIZE and LOCAL_RANK to run one process."
        )


def export_for_torch(process: ProcessInfo) -> None:
    """Set the variables that `torch.distributed` and DeepSpeed read; DeepSpeed uses the GPU numbered by local rank."""
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK=str(process.local_rank),
        LOCAL_WORLD_SIZE=str(process.local_world_size),
    )
    os.environ.setdefault("MASTER_ADDR", DEFAULT_MASTER[0])
    os.environ.setdefault("MASTER_PORT", DEFAULT_MASTER[1])


def prefer_deterministic_libraries() -> None:
    """Make cuBLAS and NCCL compute the same result every time, unless the user's variables say otherwise.

    Call it before either is first used, which reads the variables.
    """
    for name, value in DETERMINISTIC_LIBRARIES.items():
        os.environ.setdefault(name, value)


def prefer_expandable_segments() -> None:
    """Let PyTorch grow its segments of GPU memory instead of keeping pieces of fixed sizes, unless the user configured it.

    The core's weights, gigabytes that are gathered and freed among activations of changing sizes, leave holes otherwise.
    Call it before torch is imported.
    """
    if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def list_gloo_interfaces() -> list[str]:
    """Return the network interfaces that the user has chosen for Gloo."""
    return [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]


def find_own_address() -> str | None:
    """Return the IP address from which this process reaches rank 0, for connections between ranks.

    None leaves the choice to Gloo: where the user has made it (GLOO_SOCKET_IFNAME), where there is no route, and where a name
    that stands for this machine alone would be given to other machines.
    """
    if list_gloo_interfaces():
        return None
    address = _find_address_towards_rank_0()
    return address if address is None or is_one_machine() or not ipaddress.ip_address(address).is_loopback else None


def read_meeting_point() -> tuple[str, int]:
    """Return host and port at which rank 0 holds the store by which the ranks meet; ConfigError if the port is no number."""
    host, port = (os.environ.get(name, other) for name, other in zip(("MASTER_ADDR", "MASTER_PORT"), DEFAULT_MASTER))
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT is {port!r}, it must be a number.")
    return host, int(port)


def is_one_machine() -> bool:
    """Return True if all ranks are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _find_address_towards_rank_0() -> str | None:
    """Return the IP address of the interface through which MASTER_ADDR is reached; None if there is no route."""
    host, port = read_meeting_point()
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def name_own_host() -> str:
    """Return a name or address of this host for the other ranks, for connections to this process.

    That is the address from which it reaches MASTER_ADDR; where this is a loopback address, MASTER_ADDR is this host.
    """
    address = _find_address_towards_rank_0()
    if address is None or ipaddress.ip_address(address).is_loopback:
        return os.environ.get("MASTER_ADDR", DEFAULT_MASTER[0])
    return address


def is_store_in_launcher() -> bool:
    """Return True if the store by which the ranks meet is in a process of torchrun, and not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def read_restart_count() -> int:
    """Return how often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def node_name() -> str:
    """Return the name that Slurm gives this node or, without it, its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_collectives(dump_prefix: Path) -> None:
    """Make torch keep its last collectives and, where NCCL times out, write them to this path and the rank.

    What the user has set stays. Call it before a process group is made.
    """
    defaults = {
        RECORDED_COLLECTIVES: ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        str(dump_prefix): ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        "1": ("TORCH_NCCL_DUMP_ON_TIMEOUT",),
    }
    for value, names in defaults.items():
        if not any(name in os.environ for name in names):  # torch reads the first name, and else its older one
            os.environ.update(dict.fromkeys(names, value))


def usable_cores() -> int:
    """Return the number of cores that this process may run on; a container or a job has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_job_memory() -> int | None:
    """Return the bytes of memory that Slurm gave this job on this node; None outside a job, or where it set no limit."""
    megabytes = os.environ.get("SLURM_MEM_PER_NODE", "")
    per_core, cores = os.environ.get("SLURM_MEM_PER_CPU", ""), os.environ.get("SLURM_CPUS_ON_NODE", "")
    if per_core.isdecimal() and cores.isdecimal():
        megabytes = str(int(per_core) * int(cores))
    return int(megabytes) << 20 if megabytes.isdecimal() and int(megabytes) else None


def read_slurm_job() -> tuple[str, str]:
    """Return the number of the Slurm job that this process is in, and its end as Slurm gives it; "" for what is not set."""
    return os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_END_TIME", "")


def count_threads(processes: int) -> int:
    """Return the CPU threads of each of so many processes here: what OMP_NUM_THREADS says, else a share of the cores.

    PyTorch reads the variable as OpenMP does: of a list, which has one number per level of nesting, the first counts.
    """
    words = os.environ.get(THREADS, "").split(",")[0].strip()
    wanted = int(words) if words.isdecimal() else 0
    return wanted or max(usable_cores() // processes, 1)


def leave_process(status: int) -> NoReturn:
    """End this process at once, with its output flushed but without shutting the interpreter down.

    Freeing a Gloo process group joins its threads while holding the interpreter's lock, and one of the threads may be
    waiting for that lock to free a tensor: a run that succeeded would now and then hang or abort. So a process that
    joined a group never frees it, and leaves here.
    """
    flush_output()
    os._exit(status)


def quiet_libraries(local_world_size: int = 0) -> None:
    """Silence what libraries tell their own developers, except errors; set the threads of each process, and the allocator.

    Call it before torch is imported.

    Args:
        local_world_size: processes of this node, see `count_threads`; 0 leaves the number of threads as it is.
    """
    prefer_expandable_segments()
    if local_world_size:
        os.environ[THREADS] = str(count_threads(local_world_size))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which reports its start and stop
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of lm_eval, which starts processes for a moment's resampling
    # Deprecated names of collectives, of which DeepSpeed warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    # Of DDP, which gives our module as the place.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`broadcast_buffers` is deprecated")
    # DeepSpeed resets this logger's level when it is imported, and logs the accelerator it found; a filter survives.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    """Return True for log records of level error and above."""
    return record.levelno >= logging.ERROR


def keep_deepspeed_on_cpu() -> None:
    """Make DeepSpeed compute on the CPU even if there is a GPU. Call it before deepspeed is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"


@contextlib.contextmanager
def force_weights_only() -> Iterator[None]:
    """Make every `torch.load` in this process refuse objects that could run code, also in libraries that ask for them."""
    before = {name: os.environ.pop(name, None) for name in (WEIGHTS_ONLY, NOT_WEIGHTS_ONLY)}
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def use_safe_path() -> Iterator[None]:
    """Keep Python processes that are started in the block from importing modules of the current folder."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


def copy_environment() -> dict[str, str]:
    """Return this process's environment, for one that another process starts."""
    return {**os.environ}


def error_file() -> Path | None:
    """Return the file for this process's last error, which `rdt train` prints; None if `rdt train` did not start it."""
    return Path(os.environ[ERROR_FILE]) if ERROR_FILE in os.environ else None


def launcher_environment(rank: int, world_size: int, address: str, port: int, errors: Path) -> dict[str, str]:
    """Return this environment with ranks, master address and error file added, to start process `rank` here."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        ERROR_FILE: str(errors),
    }


def has_watched_launcher() -> bool:
    """Return True if this process's parent is torchrun or `rdt train`."""
    return ERROR_FILE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def share_environment(threads: int, gpus: Sequence[int] | None = None) -> dict[str, str]:
    """Return this environment for a process that shares the machine with others: its CPU threads, and its GPUs.

    Args:
        threads: CPU threads of each process, from `count_threads`.
        gpus: numbers of the GPUs among those that this process sees; None leaves all of them visible.
    """
    environment = {**os.environ, THREADS: str(threads)}
    if gpus is not None:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = [visible[number] if visible else str(number) for number in gpus]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return environment
