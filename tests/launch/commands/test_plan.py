"""`rdt plan`: the printed and written plan, invalid options, and the comparison with measured steps."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.commands.plan import fit_to_devices, plan
from launch.commands.train import train
from megatron_rdt.config import check_config, load_config
from megatron_rdt.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]
PRESET = ["plan", "--config", "configs/models/parcae_140m.yaml", "--parallel.engine", "fsdp"]
WORKS = ["--train.global_batch=512", "--train.micro_batch=1", "--train.precision=bfloat16"]


def test_a_plan_is_printed_and_written(rdt: Run, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = rdt(*PRESET, *WORKS, "--devices", 512, "--device", "h200", "--price", 3, "--tokens", 10, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for part in ("Parameters", "512 x H200", "10G tokens", "at 3 each"):
        assert part in result.stdout
    data = json.loads(out.read_text())
    assert data["parameters"]["all"] == 144_323_904
    assert data["layout"]["devices"] == data["layout"]["shard"] == 512
    assert data["memory"]["fits"] is True
    assert data["memory"]["peak"] == pytest.approx(sum(data["memory"]["parts"].values()))


def test_a_preset_is_planned_without_an_engine(rdt: Run) -> None:
    result = rdt(*PRESET[:3], "--devices", 512, "--device", "h100")
    assert result.returncode == 0, result.stderr
    for part in (
        "512 are planned with fsdp",
        "micro_batch is 32; planned with 1",
        "planned with 512",
        "512 x H100, engine fsdp",
    ):
        assert part in result.stdout


def test_every_batch_of_a_schedule_is_one_that_the_devices_divide(repository: Path) -> None:
    words = ["--train.global_batch=512", "--train.batch_schedule=0:100,10:130,20:512"]
    config, notes = fit_to_devices(load_config(repository / "configs/models/parcae_140m.yaml", words), 32)
    assert (config.train.micro_batch, config.train.global_batch) == (3, 576)
    assert config.train.batch_schedule == ["0:192", "10:192", "20:576"]
    check_config(config, 32)
    assert "train.batch_schedule is ['0:100', '10:130', '20:512']; planned with" in notes[-1]


def test_a_plan_checks_that_initial_weights_fit(
    tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--train.steps=2", "--eval.every=0"]
    assert train([*options, "--run.name=first"]) == 0
    init = ["--devices=1", "--init", str(tmp_path / "first")]
    assert plan([*options, *init, "--train.sequence_length=64"]) == 0
    said = capsys.readouterr().out
    assert "(step 2 of first), and nothing else of it" in said
    assert "train.sequence_length 32 -> 64" in said
    with pytest.raises(CheckpointError, match="dim is 32 there and 64 here"):
        plan([*options, *init, "--model.dim=64"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--device", "tpu"], ["--device is tpu", "h100"]),
        (["--devices", "0", *WORKS], ["--devices is 0"]),
        (["--devices", "3", *WORKS], ["not a multiple of 3 ranks", "nearest"]),
        (["--devices", "6", *WORKS, "--parallel.tensor", "4"], ["parallel.tensor", "does not divide"]),
        (["--utilisation", "1.5"], ["--utilisation is 1.5"]),
        (["--per_node", "-1"], ["--per_node is -1"]),
        (["--price", "-1"], ["must not be negative"]),
        (["--tokens", "2e10"], ["--tokens is 2e+10 billion; it counts billions"]),
        (["--bandwith", "9"], ["--bandwith does not exist"]),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(rdt: Run, words: list[str], parts: list[str]) -> None:
    result = rdt(*PRESET, *words)
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stderr
    assert not [part for part in parts if part not in result.stderr], result.stderr


def test_a_file_that_is_no_plan_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is computed or measured."""
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "run.json").write_text('{"losses": {}}')
    (tmp_path / "rows.json").write_text("[1, 2]")
    monkeypatch.setattr("launch.commands.plan.fit_to_devices", lambda *_: pytest.fail("began to work"))
    for name, message in (
        ("config.yaml", "exists and is not a plan of `rdt plan`; it is kept as it is"),
        ("run.json", "exists and is not a plan"),
        ("rows.json", "exists and is not a plan"),
        ("absent/plan.json", "absent does not exist"),
        (".", "is a directory, it must be a file"),
    ):
        for measure in ([], ["--measure"]):
            with pytest.raises(ConfigError, match=message):
                plan([*PRESET[1:], *WORKS, *measure, "--out", str(tmp_path / name)])
    with pytest.raises(ConfigError, match="is a device or pipe"):
        plan([*PRESET[1:], *WORKS, "--out", "/dev/null"])
    assert (tmp_path / "config.yaml").read_text() == "train: {steps: 3}\n"


def test_an_earlier_plan_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    for content in ("", None, '[{"loops": 1, "planned": {}}]\n'):
        if content is not None:
            out.write_text(content)
        assert plan([*PRESET[1:], *WORKS, "--devices", "512", "--out", str(out)]) == 0
        assert json.loads(out.read_text())["layout"]["devices"] == 512


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_measuring_prints_what_was_counted_beside_the_plan(rdt: Run, tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    result = rdt("plan", "--config", "configs/smoke.yaml", "--parallel.engine", "fsdp", "--measure", "--out", out)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())
    assert [row["loops"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["sent"] == rows[0]["sent"] == row["planned"]["sent"]
        assert row["planned"]["peak"] == pytest.approx(row["peak"], rel=0.1)
        assert f"T = {row['loops']}: peak memory" in result.stdout
    assert "forward all-gather" in result.stdout
