"""The one place that reads and sets process environment variables."""

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_rdt.errors import LaunchError

DEFAULT_MASTER = ("127.0.0.1", "29500")
ERROR_FILE = "RDT_ERROR_FILE"


@dataclass(frozen=True)
class ProcessInfo:
    """Where this process stands among those of the run.

    Attributes:
        rank, world_size: among all processes.
        local_rank, local_world_size: among those of this node.
        launcher: who started it: "torch" (torchrun, deepspeed, our own), "slurm" (srun), or "none".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"


def read_process_info() -> ProcessInfo:
    """Read the place from torchrun's and DeepSpeed's variables, else from srun's, else alone.

    Raises:
        LaunchError: a variable is missing or is not a number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _number("WORLD_SIZE")
        local_world = _number(next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(n)), "WORLD_SIZE"))
        local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in env else 0
        return ProcessInfo(_number("RANK"), world, local_rank, local_world, "torch")
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        tasks = _number("SLURM_NTASKS")
        local_world = int(env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split("(")[0].split(",")[0])
        return ProcessInfo(_number("SLURM_PROCID"), tasks, _number("SLURM_LOCALID"), local_world, "slurm")
    return ProcessInfo()


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise LaunchError(
            f"the environment variable {name} is {value!r}, it must be a number. Start the script with torchrun, "
            "deepspeed, srun or rdt train, which set it; or unset RANK and WORLD_SIZE to run one process."
        )
    return int(value)


def export_for_torch(place: ProcessInfo) -> None:
    """Set what `torch.distributed` and DeepSpeed read; DeepSpeed takes the GPU whose number is the local rank."""
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
    )
    os.environ.setdefault("MASTER_ADDR", DEFAULT_MASTER[0])
    os.environ.setdefault("MASTER_PORT", DEFAULT_MASTER[1])


def prefer_deterministic_blas() -> None:
    """Let cuBLAS give the same digits every time; it reads this when it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def usable_cores() -> int:
    """Cores that this process may run on; a container or a job has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_process(status: int) -> NoReturn:
    """End this process at once, its output flushed, without tearing the interpreter down.

    Whoever lets go of a Gloo process group last joins its threads while holding the interpreter's lock, and one of
    the threads may be waiting for that lock to let go of a tensor: a run that succeeded would now and then hang or
    abort. So a process that joined a group keeps it to the end and leaves here.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def quiet_libraries(local_world_size: int = 0) -> None:
    """Keep what libraries tell their own developers out of our output; errors stay.

    Call it before torch is imported.

    Args:
        local_world_size: processes of this node, among which the cores are shared; 0 leaves the threads alone.
    """
    if local_world_size:
        threads = max(usable_cores() // local_world_size, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which says that it starts and stops
    # Names of collectives that DeepSpeed has yet to change, once per call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    # DeepSpeed sets this logger's level when it is imported and logs its guess of the accelerator; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def keep_deepspeed_on_cpu() -> None:
    """Make DeepSpeed compute on the CPU also where it would find a GPU. Call it before deepspeed is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def error_file() -> Path | None:
    """Where a process that `rdt train` started leaves its last error, for the launcher to print."""
    return Path(os.environ[ERROR_FILE]) if ERROR_FILE in os.environ else None


def launcher_environment(rank: int, world_size: int, address: str, port: int, errors: Path) -> dict[str, str]:
    """Environment of process `rank` of `world_size` on this machine, for a launcher to pass on."""
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
