"""Records of a run: their fields, TensorBoard, the console line, and what a resume drops."""

import errno
import itertools
import json
import math
import os
import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.train import hardware
from megatron_rdt.train.hardware import PEAK_BF16_FLOPS, multiplies_bfloat16_faster, peak_flops, peak_memory_gb
from megatron_rdt.train.metrics import Console, Recorder, drop_records_after, flatten_numbers
from megatron_rdt.train.trainer import train

FIELDS = [
    *("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"),
    *("loops_mean", "loops_max", "loops_with_grad"),
    *("spectral_radius", "state_norm", "state_residual", "token_correlation"),
    *("norm_growth", "late_residual"),
    *("memory_gb", "data_wait_s", "step_s"),
]
RECORD = {
    "step": 5,
    "tokens": 640,
    "loss": 3.25,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "mfu": None,
    "loops_mean": 4.0,
    "loops_max": 4,
    "loops_with_grad": 4,
    "spectral_radius": 0.4471,
    "memory_gb": 1.5,
}


def read_strict_json(path: Path) -> list[dict]:
    """The records in a file, which must be strict JSON, without NaN."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations, samples and TensorBoard."""
    root = tmp_path_factory.mktemp("metrics")
    options = ["--depth.backprop=2", "--sample.every=4", "--sample.tokens=3", "--logging.tensorboard=true"]
    assert train(configure(f"--run.root={root}", *options)) == 0
    return root / "run"


def test_every_step_has_exactly_the_documented_fields(run: Path) -> None:
    records = read_strict_json(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert list(record) == FIELDS
        assert record["tokens"] == record["step"] * 4 * 32
        assert record["loops_mean"] == record["loops_max"]
        assert record["loops_with_grad"] == min(record["loops_max"], 2)
        assert record["mfu"] is None, "a CPU has no documented peak"
        assert (record["norm_growth"] is None) == (record["loops_max"] < 2)
        assert (record["late_residual"] is None) == (record["loops_max"] < 4)
        for key in set(FIELDS) - {
            "mfu",
            "step",
            "tokens",
            "loops_max",
            "loops_with_grad",
            "norm_growth",
            "late_residual",
        }:
            assert isinstance(record[key], float), key
            assert math.isfinite(record[key]), key
        assert 0 < record["spectral_radius"] < 1
        assert -1 <= record["token_correlation"] <= 1
        assert 0 <= record["data_wait_s"] <= record["step_s"]
        assert record["tokens_per_second"] == pytest.approx(4 * 32 / record["step_s"])
        assert 0.05 < record["memory_gb"] < 100
    assert len({record["loops_max"] for record in records}) > 1
    assert records[0]["lr"] == pytest.approx(1e-3 / 2)


def test_a_z_loss_is_part_of_the_objective_and_not_of_the_loss(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """An untrained model predicts nearly evenly: the logarithm of its normaliser is that of the vocabulary's size."""
    config = configure(f"--run.root={tmp_path}", "--train.z_loss=0.1", "--train.steps=20", "--eval.every=0")
    assert train(config) == 0
    first, *_, last = read_strict_json(tmp_path / "run" / "metrics.jsonl")
    normaliser = math.log(config.model.vocab_size)
    assert first["loss"] == pytest.approx(normaliser, rel=0.1)
    assert first["objective"] - first["loss"] == pytest.approx(0.1 * normaliser**2, rel=0.2)
    assert last["objective"] - last["loss"] < first["objective"] - first["loss"]


def test_losses_are_written_with_every_digit(run: Path) -> None:
    """The text of the loss is the shortest that reads back to the same float, so that `diff` compares exactly."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        text = re.search(r'"loss": ([^,]+),', line)
        assert text is not None
        assert repr(float(text[1])) == text[1]
    losses = [record["loss"] for record in read_strict_json(run / "metrics.jsonl")]
    assert any(float(f"{loss:.7g}") != loss for loss in losses)


def test_evaluations_and_samples(run: Path) -> None:
    evaluations = read_strict_json(run / "eval.jsonl")
    assert [(e["step"], e["tokens"], list(e["losses"])) for e in evaluations] == [
        (4, 512, ["1", "3"]),
        (8, 1024, ["1", "3"]),
    ]
    samples = read_strict_json(run / "samples.jsonl")
    assert [(s["step"], s["loops"], s["prompt"]) for s in samples] == [
        (4, 1, "def "),
        (4, 8, "def "),
        (8, 1, "def "),
        (8, 8, "def "),
    ]
    assert all(isinstance(s["text"], str) for s in samples)


def test_tensorboard_has_the_same_numbers(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert tags >= {f"train/{key}" for key in FIELDS if key not in ("step", "mfu")} | {"valid/loss_T1", "valid/loss_T3"}
    assert "train/mfu" not in tags
    written = [(event.step, event.value) for event in board.Scalars("train/loss")]
    expected = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in read_strict_json(run / "metrics.jsonl")]
    assert written == expected


def test_displays_show_the_numbers_of_the_slowest_rank_and_not_its_host() -> None:
    slowest = {"rank": 3, "host": "node7", "own_s": 0.5}
    assert dict(flatten_numbers("train/slowest_rank", slowest)) == {
        "train/slowest_rank/rank": 3,
        "train/slowest_rank/own_s": 0.5,
    }


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, tensorboard=False, start_step=0)
    recorder.record_step({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "mfu": None})
    recorder.record_evaluation({"step": 1, "tokens": 2, "losses": {"1": -math.inf, "4": 2.5}})
    # Both are on the disk before the files are closed.
    assert read_strict_json(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "mfu": None}
    ]
    assert read_strict_json(tmp_path / "eval.jsonl") == [{"step": 1, "tokens": 2, "losses": {"1": None, "4": 2.5}}]
    recorder.close()


def test_resuming_drops_later_records_and_half_lines(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, tensorboard=False, start_step=0)
    for step in range(1, 7):
        recorder.record_step({**RECORD, "step": step})
        if step % 2 == 0:
            recorder.record_evaluation({"step": step, "tokens": 1, "losses": {"1": 2.0}})
            recorder.record_sample({"step": step, "loops": 1, "prompt": "a", "text": "b\n"})
    recorder.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(lines[-1][:40])
    (tmp_path / "eval.json").write_text('{"step": 6, "losses": {"1": 2.0}}')
    (tmp_path / "metrics.jsonl.1234.tmp").write_text("left by a killed process")
    (tmp_path / "notes.txt").write_text("mine")
    drop_records_after(tmp_path, 6)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
    assert (tmp_path / "eval.json").exists()
    drop_records_after(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:4])
    for name in ("eval.jsonl", "samples.jsonl"):
        assert [record["step"] for record in read_strict_json(tmp_path / name)] == [2, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.jsonl", "metrics.jsonl", "notes.txt", "samples.jsonl"]
    # A resumed run appends to the kept records.
    recorder = Recorder(tmp_path, tensorboard=False, start_step=4)
    recorder.record_step({**RECORD, "step": 5})
    recorder.close()
    assert [record["step"] for record in read_strict_json(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"foo": 1}\n[2]\n{"step": "x"}\n')  # not by this program
    drop_records_after(tmp_path, 2)
    assert [record["step"] for record in read_strict_json(tmp_path / "metrics.jsonl")] == [1, 2]
    drop_records_after(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_console_line() -> None:
    line = Console(steps=10, first_step=0).format_line(RECORD)
    assert re.fullmatch(
        r"\[#####\.\.\.\.\.\] step 5/10  loss 3\.2500  loops 4  lr 1\.00e-03"
        r"  grad norm 0\.50  spectral radius 0\.447"
        r"  12,346 tokens/s  1\.50 GB  ETA 0:00",
        line,
    ), line
    assert "  loops 3.5 (max 4)  lr" in Console(10, 0).format_line({**RECORD, "loops_mean": 3.5})
    assert "  mfu 41.5%  " in Console(10, 0).format_line({**RECORD, "mfu": 0.415})
    slowest = {"rank": 3, "host": "node7", "ratio": 1.8}
    assert "  slowest rank 3 on node7, 1.80 x median  ETA" in Console(10, 0).format_line(
        RECORD | {"slowest_rank": slowest}
    )
    assert "[##########] step 10/10" in Console(10, 5).format_line({**RECORD, "step": 10})
    assert "loss nan" in Console(10, 0).format_line({**RECORD, "loss": math.nan, "grad_norm": math.nan})


def test_time_left_is_counted_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run did not need any time for the steps before it: 2 steps in 6 s, 8 to go, so 24 s."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    console = Console(steps=100, first_step=90)
    now[0] += 6.0
    assert console.format_line({**RECORD, "step": 92}).endswith("ETA 0:24")
    assert console.format_line({**RECORD, "step": 91}).endswith("ETA 0:54")
    now[0] += 600.0
    assert console.format_line({**RECORD, "step": 92}).endswith("ETA 40:24")


def test_progress_and_time_left_are_by_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 steps of 1 sample and 40 of 3: of 180 samples 54 are left, at 6 in 3 s."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    console = Console(100, 80, BatchSchedule.parse(["0:1", "60:3"], 3))
    now[0] += 3.0
    line = console.format_line({**RECORD, "step": 82})
    assert line.startswith("[#######...] step 82/100")
    assert line.endswith("ETA 0:27")
    warm_up = Console(100, 0, BatchSchedule.parse(["0:1", "60:3"], 3))
    now[0] += 6.0
    assert warm_up.format_line({**RECORD, "step": 60}).endswith("ETA 0:12"), "not the 0:04 of 40 such steps"


def test_an_unknown_device_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
    device = torch.device("cuda", 0)
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA B200": 2250e12,
        "AMD Instinct MI250X": 191.5e12,
        "NVIDIA GeForce RTX 4090": None,
        "NVIDIA RTX A1000": None,
        "NVIDIA H20": None,
        "NVIDIA A10": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert peak_flops(device, "bfloat16") == peak, name
        assert peak_flops(device, "float32") is None
    assert set(PEAK_BF16_FLOPS.values()) <= set(names.values())


def test_memory_is_this_process_peak() -> None:
    before = peak_memory_gb(torch.device("cpu"))
    assert before == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.01)
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert resident <= before * 1.01


@pytest.mark.parametrize(("float32", "bfloat16", "faster"), [(3.0, 1.0, True), (3.0, 2.5, False), (1.0, 9.0, False)])
def test_bfloat16_is_chosen_where_its_products_are_faster(
    float32: float, bfloat16: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(hardware, "_time_matrix_product", seconds.__getitem__)
    assert multiplies_bfloat16_faster(torch.device("cpu")) is faster
    monkeypatch.undo()
    assert all(hardware._time_matrix_product(dtype) > 0 for dtype in seconds)


def test_samples_that_cannot_be_read_are_counted_in_their_step(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for TensorBoard, which shows every number of a record."""
    read, reads = os.pread, itertools.count()

    def fail(descriptor: int, *arguments: int) -> bytes:
        is_shard = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".bin")
        if is_shard and threading.current_thread().name == "batch-loader" and next(reads) >= 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *arguments)

    options = [f"--run.root={tmp_path}", "--eval.every=0", "--train.steps=4"]
    monkeypatch.setattr(os, "pread", fail)
    assert train(configure(*options, "--data.on_unreadable=skip", "--data.retry_s=0")) == 0
    records = read_strict_json(tmp_path / "run" / "metrics.jsonl")
    assert [record["unreadable_samples"] for record in records][1:] == [4, 4, 4]
    assert records[0]["unreadable_samples"] == 0
    assert ("train/unreadable_samples", 4) in flatten_numbers("train", records[3])
    monkeypatch.setattr(os, "pread", read)
    assert train(configure(*options, "--run.name=whole")) == 0
    assert all("unreadable_samples" not in record for record in read_strict_json(tmp_path / "whole" / "metrics.jsonl"))
