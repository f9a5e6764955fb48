"""A command that a launcher started several times is refused where each process would write the same files."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import COMMANDS
from launch.commands.prep import COMMANDS as PREP_COMMANDS
from launch.single_process import refuse_copies
from megatron_rdt.config import RunConfig
from megatron_rdt.environment import ProcessInfo
from megatron_rdt.errors import ConfigError
from megatron_rdt.train import trainer
from tests.train.runs import read_all_files

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
WRITES = [[name] for name in COMMANDS if name not in ("generate", "plan", "status", "preflight")]
WRITES += [["prep", name] for name in PREP_COMMANDS if name not in ("show", "verify")]
Launched = Callable[[dict[str, str]], None]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Function that sets the variables of a launcher, and removes those of any other."""
    for name in (*TORCHRUN, *SRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def launch(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("words", WRITES, ids=" ".join)
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN, "process 1 of 2 that torchrun or deepspeed started.* unset RANK and WORLD_SIZE"),
        (SRUN, "process 0 of 2 that srun started.* unset SLURM_PROCID"),
    ],
    ids=["torchrun", "srun"],
)
def test_what_writes_is_refused(variables: dict[str, str], said: str, words: list[str], launched: Launched) -> None:
    refuse_copies(words)
    launched(variables)
    with pytest.raises(ConfigError, match=said):
        refuse_copies([*words, "--config", "configs/smoke.yaml"])
    refuse_copies([*words, "--help"])


HARMLESS = [
    "generate runs/a",
    "plan",
    "status a",
    "preflight",
    "prep show c",
    "prep verify c",
]


@pytest.mark.parametrize("words", HARMLESS)
def test_what_writes_nothing_runs_in_every_process(words: str, launched: Launched) -> None:
    launched(TORCHRUN)
    refuse_copies(words.split())


def test_one_process_of_a_launcher_is_no_copy(launched: Launched) -> None:
    launched({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    refuse_copies(["train"])
    launched(SRUN | {"SLURM_NTASKS": "1"})
    refuse_copies(["train"])


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN | {"SLURM_PROCID": "1"}], ids=["torchrun", "srun"])
def test_a_run_is_not_written_over_by_variables_of_a_launcher(
    variables: dict[str, str],
    launched: Launched,
    rdt: Callable[..., subprocess.CompletedProcess[str]],
    configure: Callable[..., RunConfig],
    tiny_options: list[str],
    tmp_path: Path,
) -> None:
    settings = [f"--run.root={tmp_path}", "--train.steps=4", "--eval.every=0", "--checkpoint.keep=1"]
    assert trainer.train(configure(*settings)) == 0
    before = read_all_files(tmp_path / "run")
    launched(variables)
    refused = rdt("train", *tiny_options, *settings)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "would write the same files" in refused.stderr
    # The function refuses it too, and with a process that claims to be local rank 1 it verifies and locks all the same.
    with pytest.raises(ConfigError, match=r"parallel\.engine is single, but there are 2 processes"):
        trainer.train(configure(*settings))
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        trainer.train(configure(*settings), process=ProcessInfo(0, 1, 1, 2, "torch"))
    assert read_all_files(tmp_path / "run") == before


def test_full_verification_does_not_depend_on_a_local_rank(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    manifest = "megatron_rdt.data.shard_files.corpus_manifest.CorpusManifest.verify"
    monkeypatch.setattr(manifest, lambda self, level="size": levels.append(level))
    config = configure(f"--run.root={tmp_path}", "--train.steps=4", "--eval.every=0", "--data.verify=full")
    assert trainer.train(config, process=ProcessInfo(0, 1, 1, 2, "torch")) == 0
    assert levels == ["full"]
