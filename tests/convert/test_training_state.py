"""Checkpoints converted from FSDP2 to ZeRO and back, optimizer included, continue training with the same losses."""

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_rdt.checkpoint import read_manifest, read_model_weights, verify, write_manifest
from megatron_rdt.config import load_config
from megatron_rdt.convert import convert, training_state
from megatron_rdt.convert.hf import read_hf
from megatron_rdt.convert.training_state import read_training_state
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.parallel.zero_universal import read_universal, read_universal_weights, write_universal
from megatron_rdt.train.trainer import train
from tests.distributed.training import train_on


def run(options: list[str], repository: Path, processes: int = 1) -> None:
    train_on(processes, ["--config", str(repository / "configs" / "smoke.yaml"), *options])


def losses(run_directory: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def check_same_weights(checkpoint: Path, found: dict[str, torch.Tensor]) -> None:
    """Check that weights are those of a checkpoint, bit for bit."""
    weights = read_model_weights(checkpoint)
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_training_continues_in_the_other_family(tmp_path: Path, repository: Path, tiny_options: list[str]) -> None:
    common = [*tiny_options, f"--run.root={tmp_path}", "--eval.every=0", "--sample.every=0", "--checkpoint.keep=0"]
    run([*common, "--run.name=fsdp", "--parallel.engine=fsdp"], repository, 2)
    saved = tmp_path / "fsdp" / "checkpoints" / "step-00000004"
    # All continue with other optimizer options than the state was saved with.
    common += ["--optimizer.beta2=0.7", "--optimizer.weight_decay=0.5", "--optimizer.eps=1e-6"]
    run([*common, "--run.name=straight", "--parallel.engine=fsdp", f"--resume={saved}"], repository, 2)
    straight = losses(tmp_path / "straight")
    assert abs(straight[8] - losses(tmp_path / "fsdp")[8]) > 1e-4
    for_zero = convert(str(saved), str(tmp_path / "for_zero"), "zero")
    verify(for_zero)

    for engine, processes in (("zero1", 2), ("zero2", 1), ("zero3", 2)):
        name = f"{engine}-{processes}"
        options = [*common, f"--run.name={name}", f"--parallel.engine={engine}"]
        run([*options, f"--resume={for_zero}"], repository, processes)
        there = losses(tmp_path / name)
        assert sorted(there) == [5, 6, 7, 8]
        assert there == pytest.approx({step: straight[step] for step in there}, rel=1e-5)

        source = str(tmp_path / name / "checkpoints" / "step-00000006")
        back = convert(source, str(tmp_path / f"back-{name}"), "native")
        run([*common, f"--run.name=back-run-{name}", "--parallel.engine=single", f"--resume={back}"], repository)
        again = losses(tmp_path / f"back-run-{name}")
        assert again == pytest.approx({step: straight[step] for step in (7, 8)}, rel=1e-5)
    check_same_weights(back, read_hf(convert(source, str(tmp_path / "hf"), "hf"))[1])


@pytest.fixture(scope="module")
def run_with_checkpoints(repository: Path, tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    config = load_config(repository / "configs" / "smoke.yaml", [*tiny_options, f"--run.root={root}"])
    assert train(config) == 0
    return root / config.run.name


def test_converting_there_and_back_loses_nothing(tmp_path: Path, run_with_checkpoints: Path) -> None:
    config = load_config(run_with_checkpoints / "config.yaml")
    first = convert(str(run_with_checkpoints), str(tmp_path / "zero"), "zero")
    second = convert(str(convert(str(first), str(tmp_path / "again"), "zero")), str(tmp_path / "native"), "native")
    check_same_weights(second, read_hf(convert(str(first), str(tmp_path / "hf"), "hf"))[1])
    versions = {name: read_manifest(folder)["versions"] for name, folder in (("zero", first), ("native", second))}
    assert {name: "deepspeed" in found for name, found in versions.items()} == {"zero": True, "native": False}
    before = read_training_state(run_with_checkpoints / "checkpoints" / "step-00000008", config)
    assert before.step == 8
    assert all(float(parts["exp_avg_sq"].abs().max()) > 0 for parts in before.tensors.values())
    for folder in (first, second, convert(str(second), str(tmp_path / "native-again"), "native")):
        after = read_training_state(folder, config)
        assert after.step == before.step
        assert set(after.tensors) == set(before.tensors)
        for name, parts in before.tensors.items():
            for key, tensor in parts.items():
                assert torch.equal(after.tensors[name][key], tensor), (folder.name, name, key)
        weights = read_model_weights(folder)
        assert all(torch.equal(weights[name], parts["fp32"]) for name, parts in before.tensors.items())
        assert json.loads((folder / "manifest.json").read_text())["converted_from"]
    with pytest.raises(ConfigError, match="not empty"):
        convert(str(first), str(second), "native")


@pytest.mark.parametrize("to", ["zero", "native", "hf"])
def test_everything_is_on_the_disk_before_it_gets_its_name(
    to: str, run_with_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced = tmp_path / "out", set()
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def checked(source: Path, target: Path) -> Path:
        if target == out:
            assert {source, *source.rglob("*")} <= synced
            synced.clear()
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    convert(str(run_with_checkpoints), str(out), to)
    assert synced == {tmp_path}


def test_where_a_checkpoint_cannot_be_put(
    run_with_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided before it is converted; through a link, it is where the link leads."""
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    assert convert(str(run_with_checkpoints), str(tmp_path / "link"), "native") == tmp_path / "disk" / "out"
    assert os.readlink(tmp_path / "link") == "disk/out"
    assert os.listdir(tmp_path / "disk") == ["out"]
    (tmp_path / "nowhere").symlink_to("absent/out")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    monkeypatch.setattr(training_state, "convert_training_state", lambda *_: pytest.fail("converted first"))
    for name, message in (
        ("mounted", r"OUT .*mounted is a mount point.* Name a directory below it, such as .*mounted/new"),
        ("nowhere", r"nowhere is a link to .*, which does not exist\..* choose another OUT"),
        ("..", "must end with the name of a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(str(run_with_checkpoints), str(tmp_path / name), "native")


def test_the_temporary_copy_lies_beside_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "results" / "out"
    (checkpoint / "zero" / "state").mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("{}")
    write_manifest(checkpoint, {"step": 1, "sequence": 1})
    places = []

    def full(saved: Path, folder: Path) -> None:
        folder.mkdir()
        places.append(folder)
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(training_state, "convert_to_universal", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        convert(str(checkpoint), str(out), "native")
    assert places[0].relative_to(out.parent).parts[0].startswith(".out.")
    assert list(out.parent.iterdir()) == []


class Code:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["fp32.pt", "exp_avg_sq.pt", "step.pt"])
def test_a_universal_checkpoint_runs_no_code(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "universal", tmp_path / "ran"
    write_universal(folder, {"weight": {key: torch.ones(2) for key in ("fp32", "exp_avg", "exp_avg_sq")}}, 3)
    assert read_universal(folder)[1] == 3
    torch.save({"param": Code(mark)}, folder / "zero" / "weight" / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be used: it holds objects other than tensors"):
        read_universal(folder)
    if name == "fp32.pt":
        with pytest.raises(CheckpointError, match=f"{name} cannot be used: it holds objects other than tensors"):
            read_universal_weights(folder)
    assert not mark.exists()
