"""Each process gets a device of its own; ranks come from the launcher's variables."""

import os

import pytest
import torch

from launch.failures import explain
from megatron_rdt.config import ModelConfig, RunConfig, TrainConfig
from megatron_rdt.environment import DETERMINISTIC_LIBRARIES, ProcessInfo, export_for_torch, read_process_info
from megatron_rdt.errors import ConfigError, LaunchError
from megatron_rdt.parallel import process_group
from megatron_rdt.parallel.process_group import choose_device, join_process_group

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def show(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return show


def process(local_rank: int, processes: int, launcher: str) -> ProcessInfo:
    return ProcessInfo(local_rank, processes, local_rank, processes, launcher)


def test_without_a_gpu(gpus) -> None:
    gpus(0)
    assert choose_device("auto", process(1, 2, "torch")) == torch.device("cpu")
    assert choose_device("cpu", process(1, 2, "torch")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no GPU"):
        choose_device("cuda", process(0, 1, "none"))


def test_one_gpu_per_process(gpus) -> None:
    gpus(4)
    for launcher in ("torch", "slurm"):
        assert [choose_device("auto", process(i, 4, launcher)).index for i in range(4)] == [0, 1, 2, 3]
    assert choose_device("cpu", process(3, 4, "torch")) == torch.device("cpu")


def test_two_processes_never_share_a_gpu(gpus) -> None:
    gpus(1)
    assert choose_device("auto", process(0, 2, "torch")) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="2 processes on this machine and 1 GPU"):
        choose_device("auto", process(1, 2, "torch"))


def test_srun_may_show_each_process_its_own_gpu(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}.items():
        monkeypatch.setenv(name, value)
    found = read_process_info()
    assert found == ProcessInfo(3, 4, 1, 2, "slurm")
    assert choose_device("auto", found) == torch.device("cuda", 0)


def test_a_gpu_may_use_tf32_in_bfloat16_runs_alone(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(process_group, "bind_near_gpu", lambda device: None)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("bfloat16", "high"), ("float32", "highest")):
            train = TrainConfig(precision=precision, deterministic=False)  # type: ignore[arg-type]
            device = join_process_group(RunConfig(model=ModelConfig(), train=train), process(0, 1, "none"))
            assert device == torch.device("cuda", 0)
            assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_torch_reads_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "9")
    export_for_torch(ProcessInfo(3, 4, 1, 2, "slurm"))
    assert read_process_info() == ProcessInfo(3, 4, 1, 2, "torch")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_that_is_not_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(each, "1")
    monkeypatch.setenv(name, "abc")
    with pytest.raises(LaunchError, match=f"{name} is 'abc'"):
        read_process_info()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but there are 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but there is 1 process"),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK is 3, but there are 2 processes",
        ),
    ],
)
def test_a_rank_beyond_the_number_of_processes(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=said):
        read_process_info()


@pytest.fixture
def kept_settings():
    """Restore the settings of torch that a run on a GPU changes."""
    fill, precision = torch.utils.deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_excludes_what_is_not(
    deterministic: bool, gpus, kept_settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(process_group, "bind_near_gpu", lambda device: None)
    for name in DETERMINISTIC_LIBRARIES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_PROTO", "LL128")
    config = RunConfig(model=ModelConfig(), train=TrainConfig(deterministic=deterministic))
    join_process_group(config, process(0, 1, "none"))
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() != deterministic
    found = {name: os.environ.get(name) for name in DETERMINISTIC_LIBRARIES}
    expected = DETERMINISTIC_LIBRARIES if deterministic else dict.fromkeys(DETERMINISTIC_LIBRARIES)
    assert found == {**expected, "NCCL_PROTO": "LL128"}, "what the user has set stays"


def test_an_operation_without_a_deterministic_kernel_is_explained() -> None:
    """The message of torch is that of `alertNotDeterministic`, which every such operation calls."""
    said = (
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or ..."
    )
    explained = explain(RuntimeError(said))
    assert explained is not None
    assert "cumsum_cuda_kernel does not have a deterministic implementation on this device. Set" in str(explained)
    assert "--train.deterministic false" in str(explained)
