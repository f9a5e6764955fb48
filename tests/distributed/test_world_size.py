"""The world size spreads the work and changes nothing else: weights, samples, loop counts, losses, checkpoints."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rdt.config import DepthConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader, TokenCorpus
from megatron_rdt.depth import DepthSampler
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from tests.distributed.processes import run_on_processes
from tests.distributed.training import train_on
from tests.distributed.world_size_worker import hash_initial_weights, hash_tensors, make_config

ENGINES = ["ddp", "fsdp", "zero1", "zero3"]
GLOBAL_BATCH = 4


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_initial_weights_are_those_of_one_process(world_size: int) -> None:
    engines = ["single", *ENGINES] if world_size == 1 else ENGINES
    verdicts = run_on_processes(hash_initial_weights, world_size, engines, timeout=110)
    assert len(verdicts) == world_size
    assert all(len(verdict) == 2 * len(engines) for verdict in verdicts)
    for tied in (True, False):
        config = make_config("single", tied)
        expected = hash_tensors(
            dict(initialize(RecurrentDepthTransformer(config.model), config.run.seed).named_parameters())
        )
        assert ("head.weight" in expected) is not tied
        for engine in engines:
            name = f"{engine} {'tied' if tied else 'untied'}"
            assert [verdict[name] for verdict in verdicts] == [expected] * world_size, engine


def global_batches(corpus: TokenCorpus, world_size: int, micro_batch: int) -> list[dict[int, tuple[Any, ...]]]:
    """Per step: sample number -> (its tokens, T, k, seed of its initial state), over all ranks, as the trainer does."""
    sampler = DepthSampler(DepthConfig(mean=4, max=16, backprop=3), seed=5)
    steps: list[dict[int, tuple[Any, ...]]] = [{} for _ in range(12)]
    for rank in range(world_size):
        loader = BatchLoader(corpus, BatchSchedule.constant(8), rank, world_size, total_samples=8 * len(steps))
        for step, batch in enumerate(loader):
            for at in range(0, len(batch.samples), micro_batch):
                samples = batch.samples[at : at + micro_batch]
                plan = sampler.plan(step, samples)
                for i, sample in enumerate(samples):
                    assert sample not in steps[step]
                    window = batch.tokens[at + i].numpy().tobytes()
                    steps[step][sample] = (window, plan.iterations[i], plan.backprop, plan.state_seeds[i])
        loader.close()
    return steps


def test_samples_and_depth_plans_do_not_depend_on_the_world_size(tiny_corpus: Path) -> None:
    corpus = TokenCorpus(tiny_corpus, "train", 32, seed=5)
    expected = global_batches(corpus, 1, 8)
    assert all(len(step) == 8 for step in expected)
    assert len({loops for step in expected for _, loops, _, _ in step.values()}) > 2
    for world_size, micro_batch in ((1, 1), (2, 2), (2, 4), (4, 1), (4, 2)):
        assert global_batches(corpus, world_size, micro_batch) == expected


def records(directory: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / file).read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_damage_that_one_rank_finds_stops_all(
    tiny_options: list[str], tiny_corpus: Path, repository: Path, tmp_path: Path
) -> None:
    """Only the first rank of the node reads every byte; the other would wait for it in the first collective."""
    data = Path(shutil.copytree(tiny_corpus, tmp_path / "data"))
    shard = data / "train" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    words = [*tiny_options, f"--run.root={tmp_path}", f"--data.path={data}", "--data.verify=full", "--nproc=2"]
    command = [sys.executable, "-m", "launch.cli", "train", *words, "--parallel.engine=ddp"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1
    # Not "rank 0: ...": it is the error of all.
    assert f"error: {data / 'train' / 'shard-00000'}.bin has other content than was written" in result.stderr


@pytest.fixture(scope="module")
def fsdp_options(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> list[str]:
    """Options of runs that share one folder; every checkpoint is kept."""
    root = tmp_path_factory.mktemp("runs")
    extra = ["--parallel.engine=fsdp", "--eval.every=4", "--checkpoint.every=4", "--checkpoint.keep=0"]
    return [*tiny_options, *extra, f"--run.root={root}"]


@pytest.fixture(scope="module")
def two_ranks(fsdp_options: list[str]) -> Path:
    """The uninterrupted run on two processes."""
    train_on(2, [*fsdp_options, "--run.name=two"])
    return Path(fsdp_options[-1].split("=")[1]) / "two"


def check_same_training(mine: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for key in ("step", "tokens", "lr", "loops_mean", "loops_max", "loops_with_grad"):
        assert [record[key] for record in mine] == [record[key] for record in expected], key
    assert [record["loss"] for record in mine] == pytest.approx([record["loss"] for record in expected], abs=1e-5)


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_has_the_same_losses_and_loops(processes: int, two_ranks: Path, fsdp_options: list[str]) -> None:
    train_on(processes, [*fsdp_options, f"--run.name=on-{processes}"])
    expected = records(two_ranks)
    assert len(expected) == 8
    assert len({record["loops_max"] for record in expected}) > 1
    check_same_training(records(two_ranks.parent / f"on-{processes}"), expected)
    mine, expected = (records(folder, "eval.jsonl") for folder in (two_ranks.parent / f"on-{processes}", two_ranks))
    assert [record["step"] for record in expected] == [4, 8]
    for one, other in zip(mine, expected, strict=True):
        assert (one["step"], one["tokens"]) == (other["step"], other["tokens"])
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-5)
        assert len(set(one["losses"].values())) == 2, "one for each T"


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_another_number(
    processes: int, two_ranks: Path, fsdp_options: list[str]
) -> None:
    source = two_ranks / "checkpoints" / "step-00000004"
    train_on(processes, [*fsdp_options, f"--run.name=resumed-{processes}", f"--resume={source}"])
    check_same_training(records(two_ranks.parent / f"resumed-{processes}"), records(two_ranks)[4:])


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_bfloat16_learns_with_float32_weights(two_ranks: Path, fsdp_options: list[str]) -> None:
    extra = ["--train.precision=bfloat16", "--train.steps=40", "--optimizer.lr=4e-3", "--checkpoint.every=0"]
    train_on(2, [*fsdp_options, *extra, "--run.name=bf16"])
    directory = two_ranks.parent / "bf16"
    losses = [record["loss"] for record in records(directory)]
    norms = [record["grad_norm"] for record in records(directory)]
    assert len(losses) == 40
    assert all(map(math.isfinite, losses + norms))
    assert sum(losses[-4:]) / 4 < losses[0] - 1
    # Step 1 has the weights, data and T of the float32 run: bfloat16 was really used, and is close.
    assert 0 < abs(losses[0] - records(two_ranks)[0]["loss"]) < 0.02
    for part in ("model", "optimizer"):
        metadata = dcp.FileSystemReader(directory / "checkpoints" / "step-00000040" / part).read_metadata()
        tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        assert len(tensors) > 20
        assert {name: entry.properties.dtype for name, entry in tensors.items()} == dict.fromkeys(
            tensors, torch.float32
        )
