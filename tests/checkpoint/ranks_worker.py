"""Runs on every rank: saves that fail on one rank, and starts whose files one rank sees differently."""

import logging
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import choose
from megatron_rdt.checkpoint.health import Manifests
from megatron_rdt.checkpoint.manifest import list_content_files
from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.errors import RdtError
from megatron_rdt.parallel import Engine
from tests.checkpoint.save_worker import make_engine_with_model

FILE_LIMIT_BYTES = 4000


def make_engine_by_name(name: str) -> Engine:
    """An engine of this name with a tiny model."""
    model = ModelConfig(vocab_size=31, dim=16, core_layers=1, heads=2, kv_heads=2)
    train = TrainConfig(device="cpu", global_batch=2, micro_batch=1)
    return make_engine_with_model(RunConfig(model=model, train=train, parallel=ParallelConfig(engine=name)))


def save(engine: Engine, run: Path, step: int) -> None:
    """Save a checkpoint of `step` whose parent is the step before."""
    facts = {"parent": f"step-{step - 1:08d}" if step > 1 else None}
    checkpoints.stage_checkpoint(engine, run, "{}", {"step": step}, facts, None, 0)()


def describe_outcome(action: Callable[[], object]) -> str:
    """Return what the action returned, as text, or the message of its error."""
    try:
        return str(action())
    except RdtError as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def limit_file_size() -> Iterator[None]:
    """Let no file of this process grow beyond a few thousand bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail_to_copy(source: str, target: str) -> None:
    """Raise the error of a full disk."""
    raise OSError(28, "No space left on device", target)


def only_on_rank(rank: int, trouble: AbstractContextManager[object]) -> AbstractContextManager[object]:
    """Return the trouble on this rank, and none on the others."""
    return trouble if dist.get_rank() == rank else nullcontext()


def save_with_failures(root: Path, name: str) -> dict[str, str]:
    """Return this rank's error for each way in which one rank fails to write."""
    engine, run, found = make_engine_by_name(name), root / name, {}
    save(engine, run, 1)
    for rank in range(dist.get_world_size()):
        with only_on_rank(rank, limit_file_size()):
            found[f"{name} {rank}"] = describe_outcome(lambda: save(engine, run, 2))
        found[f"{name} {rank} left"] = verify_and_list(run)
    if name.startswith("zero"):
        # DeepSpeed writes this after the states, on the first rank.
        with only_on_rank(0, mock.patch("deepspeed.runtime.engine.copyfile", fail_to_copy)):
            found[f"{name} script"] = describe_outcome(lambda: save(engine, run, 2))
        found[f"{name} script left"] = verify_and_list(run)
    save(engine, run, 2)
    found[f"{name} at last"] = verify_and_list(run)
    found[f"{name} versions"] = " ".join(checkpoints.read_manifest(run / "checkpoints" / "step-00000002")["versions"])
    return found


def verify_and_list(run: Path) -> str:
    """Verify every checkpoint and list all names below checkpoints/."""
    dist.barrier()
    for directory in checkpoints.list_complete_checkpoints(run):
        checkpoints.verify(directory)
        there = {str(path.relative_to(directory)) for path in list_content_files(directory)}
        assert there == set(checkpoints.read_manifest(directory)["files"])
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    dist.barrier()
    return " ".join(names)


def find_starts(root: Path) -> dict[str, str]:
    """Return where this rank would start, in situations that ranks may see differently."""
    logging.disable(logging.CRITICAL)
    engine, run, found = make_engine_by_name("fsdp"), root / "starts", {}
    for step in (1, 2, 3):
        save(engine, run, step)
    everything = choose.read_manifests

    def start(name: str, resume: str = "auto", where: Path = run) -> None:
        found[name] = describe_outcome(lambda: getattr(checkpoints.find_start(where, resume), "source", None))
        dist.barrier()

    def but_the_last(directory: Path) -> Manifests:
        return {name: manifest for name, manifest in everything(directory).items() if name != "step-00000003"}

    start("none", "none")
    start("good")
    start("fresh", where=root / "absent")
    start("absent", str(root / "absent"))
    unreadable = PermissionError(13, "Permission denied", str(run))
    for rank in range(dist.get_world_size()):
        with only_on_rank(rank, mock.patch.object(choose, "read_manifests", but_the_last)):
            start(f"stale {rank}")
        with only_on_rank(rank, mock.patch.object(choose, "read_manifests", side_effect=unreadable)):
            start(f"unreadable {rank}")
    last = run / "checkpoints" / "step-00000003"
    for name in ("trainer.json", "config.yaml"):  # the first and the last of ten files, one in each rank's share
        content = (last / name).read_bytes()
        on_first_rank(lambda name=name, content=content: (last / name).write_bytes(bytes(len(content))))
        start(f"damaged {name}")
        start(f"damaged {name}, named", str(last))
        on_first_rank(lambda name=name, content=content: (last / name).write_bytes(content))
    start("all good again", str(run))
    on_first_rank(lambda: [shutil.rmtree(directory / "rng") for directory in (run / "checkpoints").iterdir()])
    start("all damaged")
    return found


def on_first_rank(action: Callable[[], object]) -> None:
    """Run an action on rank 0 while the others wait."""
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def save_with_all_failures(root: Path, engines: Sequence[str]) -> dict[str, str]:
    """Return the errors of this rank on every engine."""
    logging.disable(logging.CRITICAL)
    found: dict[str, str] = {}
    for name in engines:
        found |= save_with_failures(root, name)
    return found


def spoil_weights(root: Path, engines: Sequence[str]) -> dict[str, str]:
    """Return, for each engine, if weights are said to be finite: before, and after one rank's shard has a NaN."""
    found = {}
    for name in engines:
        engine = make_engine_by_name(name)
        before = engine.has_finite_weights()
        if dist.get_rank() == 1:
            shard = next(weight for weight in engine.local_weights() if weight.numel())
            shard.detach().view(-1)[0] = float("nan")
        found[name] = f"{before} {engine.has_finite_weights()}"
    return found
