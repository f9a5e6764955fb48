"""A shard that one rank cannot read, or that is cut short under the run: named, tried again, then the end, or left out."""

import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from megatron_rdt.files import read_json_lines
from tests.checkpoint.runs import read_losses
from tests.distributed.processes import start_ranks
from tests.distributed.training import start_training, train_on, wait_for_step
from tests.faults.conftest import RecordCost
from tests.faults.unreadable_rank import train_with_bad_disk

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100)]
READS, ROWS_PER_RANK = 10, 2
WHO = f"rank 1 on {re.escape(socket.gethostname())}"
REFUSED = r"/train/[\w-]+\.bin cannot be read from byte [\d,]+ on: Input/output error"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, faulty_options: list[str]) -> tuple[Path, list[str]]:
    """A run that was left alone, and options of the same one."""
    options = [*faulty_options, "--run.name=r"]
    options += ["--train.steps=16", "--checkpoint.every=2", "--data.retry_s=10"]
    root = tmp_path_factory.mktemp("straight")
    train_on(2, [*options, f"--run.root={root}"])
    return root / "r", options


def train_on_bad_disk(options: list[str], seconds: float | None, statuses: list[int]) -> str:
    """Train with a disk of rank 1 that is bad for some seconds; return what that rank printed."""
    with start_ranks(train_with_bad_disk, 2, options, 1, READS, seconds, group=False) as ranks:
        assert ranks.wait(80) == statuses, ranks.format_report()
        return ranks.read_output(1)


def test_a_disk_that_recovers_is_waited_for(
    straight: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost
) -> None:
    whole, options = straight
    said = train_on_bad_disk([*options, f"--run.root={tmp_path}"], 1.2, [0, 0])
    assert re.search(rf"{WHO}: \S+{REFUSED}.* It is tried again for 10 s", said), said
    waited = re.search(rf"{WHO}: read after ([\d.]+) s", said)
    assert waited, said
    assert read_losses(tmp_path / "r") == read_losses(whole)
    record_cost("shard unreadable on one rank for 1.2 s", float(waited[1]), 0)


def test_a_disk_that_does_not_recover_stops_the_run(
    straight: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost
) -> None:
    whole, options = straight
    options = [*options, f"--run.root={tmp_path}"]
    said = train_on_bad_disk([*options, "--data.retry_s=1"], None, [1, 1])
    assert re.search(
        rf"error.*{WHO}: \S+{REFUSED}.* It was tried again \d times in [\d.]+ s \(data\.retry_s\)", said
    ), said
    reached = max(read_losses(tmp_path / "r"), default=0)
    assert f"resumed from {tmp_path}" in train_on(2, [*options, "--resume=auto"])
    assert read_losses(tmp_path / "r") == read_losses(whole)
    record_cost("shard unreadable on one rank, data.on_unreadable stop", None, reached % 2)


def test_a_run_goes_on_without_what_cannot_be_read(
    straight: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost
) -> None:
    whole, options = straight
    words = [*options, "--data.on_unreadable=skip", "--data.retry_s=0.5"]
    said = train_on_bad_disk([*words, f"--run.root={tmp_path}"], None, [0, 0])
    assert re.search(rf"{WHO}: \S+{REFUSED}.* training goes on without what cannot be read: \d samples so far", said), (
        said
    )
    losses, expected = read_losses(tmp_path / "r"), read_losses(whole)
    assert list(losses) == list(expected)
    counts = [record["unreadable_samples"] for _, _, record in read_json_lines(tmp_path / "r" / "metrics.jsonl")]
    assert counts[0] == 0
    assert counts[-1] == ROWS_PER_RANK
    assert sorted(counts) == counts
    assert losses[1] == pytest.approx(expected[1], rel=1e-6), "before the fault"
    assert losses[16] == pytest.approx(expected[16], rel=0.2)
    assert losses[16] != pytest.approx(expected[16], rel=1e-6), "the data of one rank is missing"
    train_on(2, [*words, f"--run.root={tmp_path / 'good'}"])
    assert read_losses(tmp_path / "good" / "r") == pytest.approx(expected, rel=1e-5)
    record_cost("shard unreadable on one rank, data.on_unreadable skip", None, 0)


def test_a_shard_that_is_cut_short_under_the_run_stops_it(
    straight: tuple[Path, list[str]], tiny_corpus: Path, tmp_path: Path, record_cost: RecordCost
) -> None:
    """No time is lost with it: it does not grow again by itself. With the former file the run goes on."""
    _, options = straight
    corpus = Path(shutil.copytree(tiny_corpus, tmp_path / "corpus"))
    options = [*options, f"--data.path={corpus}", "--train.steps=60"]
    train_on(2, [*options, f"--run.root={tmp_path / 'whole'}"])
    shard, run = next((corpus / "train").glob("*.bin")), tmp_path / "r"
    content = shard.read_bytes()
    options = [*options, f"--run.root={tmp_path}", "--resume=auto"]
    with start_training(options, 2) as ranks:
        wait_for_step(run, 4, ranks.has_ended)
        os.truncate(shard, 100)
        assert 1 in ranks.wait(60), ranks.format_report()
        said = ranks.format_report()
    assert re.search(rf"rank \d on \S+: {shard} ends at token \d+ while tokens up to \d+ were asked for", said), said
    assert "tried again" not in said
    reached = max(read_losses(run))
    shard.write_bytes(content)
    train_on(2, options)
    assert read_losses(run) == read_losses(tmp_path / "whole" / "r")
    record_cost("shard cut short under the run", None, reached % 2)
