"""`--init` on several ranks: every engine takes the weights of every engine's checkpoint, exactly."""

from pathlib import Path

import pytest

from tests.distributed.initial_weights_worker import compare_all, fail_on_rank_0
from tests.distributed.processes import run_on_processes
from tests.distributed.training import train_on

SOURCES, TARGETS = ["fsdp", "zero1", "zero3"], ["ddp", "fsdp", "fsdp tensor", "zero1", "zero3"]


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_every_engine_takes_the_weights_of_every_other(tmp_path: Path, tiny_corpus: Path) -> None:
    first, second = run_on_processes(compare_all, 2, SOURCES, TARGETS, tiny_corpus / "tokenizer", tmp_path, timeout=170)
    assert first == second
    assert len(first) == len(SOURCES) * len(TARGETS)
    for case, differences in first.items():
        assert differences["begun"] == 0, case
        assert differences["stepped"] < 1e-20, f"{case}: master weights are those of the seed"


@pytest.mark.distributed
@pytest.mark.timeout(100)
def test_a_failure_on_rank_0_is_raised_on_all(tmp_path: Path, tiny_corpus: Path) -> None:
    first, second = run_on_processes(fail_on_rank_0, 2, tiny_corpus / "tokenizer", tmp_path, timeout=90)
    assert first == second
    assert "is of another model: dim is 32 there and 64 here" in first[0]
    assert "cannot be read: no such tensor" in first[1].replace("'", "")


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_run_on_another_number_of_ranks(tmp_path: Path, tiny_options: list[str]) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--eval.every=0", "--train.steps=2"]
    train_on(2, [*options, "--run.name=first", "--parallel.engine=zero3"])
    words = ["--run.name=second", f"--init={tmp_path / 'first'}", "--resume=auto", "--train.sequence_length=48"]
    said = train_on(4, [*options, *words, "--parallel.engine=fsdp"])
    assert "(step 2 of first), and nothing else of it" in said
    assert "steps 0 to 2" in said
    said = train_on(4, [*options, *words, "--parallel.engine=fsdp", "--train.steps=3"])
    assert "resumed from" in said
    assert "steps 2 to 3" in said
