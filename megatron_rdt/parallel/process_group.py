"""Join the process group of a run: choose this process's device, then meet the other ranks."""

import contextlib
import ipaddress
import socket
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_rdt.config import RunConfig
from megatron_rdt.environment import (
    ProcessInfo,
    export_for_torch,
    is_one_machine,
    is_store_in_launcher,
    name_own_host,
    prefer_deterministic_libraries,
    read_meeting_point,
    read_restart_count,
    record_collectives,
)
from megatron_rdt.errors import ConfigError
from megatron_rdt.parallel.numa import bind_near_gpu
from megatron_rdt.run_directory import HANG, run_directory_of

NCCL_EXTRA_S = 30.0
STORE_KEY = "megatron_rdt/address of rank 0's store"
FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs with products of float8 numbers: Ada, then Hopper


def join_process_group(config: RunConfig, process: ProcessInfo) -> torch.device:
    """Set up this process's device and return it; join the process group unless the engine runs on one process."""
    device = choose_device(config.train.device, process)
    if config.train.float8 != "none":
        require_float8(device)
    if device.type == "cuda":
        _set_up_gpu(device, config)
        process = replace(process, local_rank=device.index)  # DeepSpeed takes the GPU whose number is the local rank
    if config.parallel.engine_kind.many_processes:
        export_for_torch(process)
        record_collectives(run_directory_of(config).absolute() / HANG / "nccl-rank-")
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = make_timeout(config.parallel.start_timeout_s, backend)
        store = _move_store_to_rank_0(timeout) if is_store_in_launcher() else _meet(process, timeout)
        dist.init_process_group(backend, timeout=timeout, **store)
    return device


def _meet(process: ProcessInfo, timeout: timedelta) -> dict[str, Any]:
    """Return the arguments of `init_process_group` for a store at MASTER_ADDR and MASTER_PORT, which rank 0 holds."""
    store = open_store(process.rank, world_size=process.world_size, timeout=timeout)
    return {"store": store, "rank": process.rank, "world_size": process.world_size}


def open_store(rank: int, **settings: Any) -> dist.TCPStore:
    """Return the store at MASTER_ADDR and MASTER_PORT, which rank 0 holds; `settings` are those of the store."""
    host, port = read_meeting_point()
    if rank == 0:
        return serve_store(host, port, **settings)
    return dist.TCPStore(host, port, is_master=False, **settings)


def serve_store(host: str, port: int, **settings: Any) -> dist.TCPStore:
    """Return a store that this process holds and that listens at this address alone, if all ranks reach it there.

    PyTorch would listen on every interface. That remains where several machines may understand a name differently, and
    where the address is not one of this machine.

    Args:
        host: name or address by which the other ranks find this process.
        port: number; 0 for any that is free.
        settings: of the store.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
        is_clear = is_one_machine() or not is_loopback
    except ValueError:  # a name
        is_clear = is_one_machine()
    if is_clear:
        with contextlib.suppress(OSError):
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                port = listener.getsockname()[1]
                settings["master_listen_fd"] = listener.detach()
    return dist.TCPStore(host, port, is_master=True, **settings)


def _move_store_to_rank_0(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments of `init_process_group` for a store that rank 0 holds.

    The ranks still agree and save through it when a launcher that held the first one has ended.
    """
    launchers, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts the ranks again: the address of an earlier start is still in it.
    key = f"{STORE_KEY}, start {read_restart_count()}"
    if rank == 0:
        host = name_own_host()
        own = serve_store(host, 0, timeout=timeout, wait_for_workers=False)
        launchers.set(key, f"{host} {own.port}")
    else:
        host, port = launchers.get(key).decode().split()
        own = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
    return {"store": own, "rank": rank, "world_size": world_size}


def limit_collectives(timeout_s: float) -> None:
    """Let collectives of all groups of this process fail after `timeout_s` seconds, those that begin from now on."""
    for group in dist.distributed_c10d._world.pg_map:
        _set_pg_timeout(make_timeout(timeout_s, dist.get_backend(group)), group)


def make_timeout(seconds: float, backend: str) -> timedelta:
    """Return the timeout of a group. NCCL's ends the process with a signal, so that of `train/watchdog.py` comes before."""
    return timedelta(seconds=seconds + (NCCL_EXTRA_S if backend == "nccl" else 0))


def choose_device(wanted: str, process: ProcessInfo) -> torch.device:
    """Return the CPU, or the GPU that belongs to this process; raise ConfigError if there is none for it.

    Args:
        wanted: `train.device`.
        process: ranks and launcher of this process.

    Raises:
        ConfigError: there is no GPU, or there are fewer GPUs than processes.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise ConfigError("train.device is cuda, but PyTorch sees no GPU here. Use --train.device cpu.")
    if visible == 1 and process.launcher == "slurm":  # srun may show each process its own GPU only
        return torch.device("cuda", 0)
    if process.local_rank >= visible:
        raise ConfigError(
            f"there are {process.local_world_size} processes on this machine and {visible} GPU(s). Start one process per "
            "GPU, or use --train.device cpu."
        )
    return torch.device("cuda", process.local_rank)


def has_float8(device: torch.device) -> bool:
    """Return True if the device multiplies float8 numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def require_float8(device: torch.device) -> None:
    """Raise ConfigError unless the device multiplies float8 numbers."""
    if has_float8(device):
        return
    found = "a CPU"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)}, of compute capability {major}.{minor}"
    raise ConfigError(
        "train.float8 matrix_products needs a GPU that multiplies float8 numbers, of compute capability 8.9 or more (L40S, "
        f"H100, H200, B200); this is {found}. Set --train.float8 none."
    )


def allow_tf32(precision: str) -> None:
    """Let products of float32 matrices round their factors to TF32 where training is in bfloat16, which rounds them more.

    It concerns what stays float32 there: injections, the matrices around the loop, routers. float32 training is exact.
    """
    torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")


def _set_up_gpu(device: torch.device, config: RunConfig) -> None:
    """Make `device` the current one, with the products that the precision allows, and deterministic kernels if asked for."""
    torch.cuda.set_device(device)
    bind_near_gpu(device)
    allow_tf32(config.train.precision)
    if config.train.deterministic:
        prefer_deterministic_libraries()
        # Operations without a deterministic kernel raise an error; with warn_only, flash attention would not use its own.
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has none
        # Filling every new tensor costs time, and nothing reads memory before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
