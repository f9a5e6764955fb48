"""Every command that reads a checkpoint, on checkpoints with broken and hostile files: a sentence, and nothing runs."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launch.cli import run_command
from megatron_rdt.config import dump_config, load_config
from megatron_rdt.convert import convert
from tests.checkpoint.hostile import DAMAGES, list_files, replace_file

pytestmark = pytest.mark.slow

FILES = {
    "native": [
        "config.yaml",
        "manifest.json",
        "model/.metadata",
        "model/__0_0.distcp",
        "optimizer/.metadata",
        "optimizer/__0_0.distcp",
        "rng/rank-00000.pt",
        "tokenizer/token_bytes.npy",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer.model",
        "tokenizer/tokenizer_config.json",
        "trainer.json",
    ],
    "universal": [
        "exp_avg.pt",
        "exp_avg_sq.pt",
        "fp32.pt",
        "step.pt",
        "universal/mp_rank_00_model_states.pt",
        "universal/zero/optimizer_state.pt",
        "universal/zero_pp_rank_0_mp_rank_00_model_states.pt",
    ],
}
"""The files of each layout; those in the folder of a parameter by their own name."""


@pytest.fixture(scope="module")
def sound(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each layout, and the run's config as a file."""
    root = tmp_path_factory.mktemp("sound")
    native = finished / "checkpoints" / "step-00000004"
    (root / "config.yaml").write_text(dump_config(load_config(finished / "config.yaml")))
    return {
        "native": native,
        "universal": convert(str(native), str(root / "universal"), "zero"),
        "config": root / "config.yaml",
    }


def find_file(checkpoint: Path, name: str) -> str:
    """The path of a file of `FILES` below a checkpoint."""
    return next(path for path in list_files(checkpoint) if path == name or path.endswith(f"/{name}"))


def list_commands(checkpoint: Path, config: Path, root: Path) -> Iterator[list[str]]:
    """Yield every command that reads a checkpoint; what they write is below `root`."""
    train = ["train", "--config", str(config), f"--run.root={root}", "--eval.every=0", "--train.steps=5"]
    yield ["generate", str(checkpoint), "--tokens", "2", "--loops", "2"]
    yield ["eval", str(checkpoint), "--loops", "1", "--sequences", "2"]
    yield ["convert", str(checkpoint), str(root / "native"), "--to", "native"]
    yield ["convert", str(checkpoint), str(root / "zero"), "--to", "zero"]
    yield ["convert", str(checkpoint), str(root / "hf"), "--to", "hf"]
    yield ["plan", "--config", str(config), "--init", str(checkpoint), "--devices", "1"]
    yield [*train, "--run.name=begun", "--init", str(checkpoint)]
    yield [*train, "--run.name=resumed", "--resume", str(checkpoint)]


def check_refused_or_done(words: list[str], payload: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command: it works or ends in one sentence, and no payload ran; return its status."""
    capsys.readouterr()
    status = run_command(words)
    errors = capsys.readouterr().err
    assert not payload.exists(), f"{words} ran the payload"
    assert "Traceback" not in errors, (words, errors)
    assert status in (0, 1, 2), (words, errors)
    assert (status == 0) == ("error: " not in errors), (words, status, errors)
    return status


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in FILES.items() for name in names])
def test_no_file_runs_code_or_ends_in_a_traceback(
    layout: str, name: str, sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, payload = tmp_path / "damaged", tmp_path / "payload"
    file = find_file(sound[layout], name)
    # All commands on what could run; else one that reads the file.
    reader = "generate" if name.startswith("tokenizer/") else "native" if layout == "universal" else "--resume"
    for kind, damage in DAMAGES.items():
        shutil.copytree(sound[layout], damaged)
        replace_file(damaged, file, damage((damaged / file).read_bytes(), payload))
        commands = list(list_commands(damaged, sound["config"], tmp_path / "out"))
        for words in commands if kind == "saved by torch" else [words for words in commands if reader in words]:
            check_refused_or_done(words, payload, capsys)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(damaged)


def test_every_file_is_tried(sound: dict[str, Path]) -> None:
    for layout, names in FILES.items():
        found = {find_file(sound[layout], name) for name in names}
        common = {path for path in list_files(sound["native"]) if not path.startswith(("model/", "optimizer/"))}
        assert set(list_files(sound[layout])) - (common if layout == "universal" else set()) == found


@pytest.mark.parametrize("what", ["a link to a file", "a link to a folder", "a pipe"])
def test_links_in_a_checkpoint_are_not_followed(
    what: str, sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, secret = tmp_path / "c", tmp_path / "secret"
    shutil.copytree(sound["native"], checkpoint)
    secret.mkdir()
    file = checkpoint / "tokenizer" / "tokenizer_config.json"
    (secret / "key").write_bytes(file.read_bytes())
    if what == "a pipe":
        os.mkfifo(checkpoint / "tokenizer" / "chat_template.jinja")
    elif what == "a link to a file":
        file.unlink()
        file.symlink_to(secret / "key")
    else:
        (checkpoint / "rng" / "more").symlink_to(secret)
    for words in list_commands(checkpoint, sound["config"], tmp_path / "out"):
        capsys.readouterr()
        assert run_command(words) == 1
        assert "a checkpoint holds files of its own only" in capsys.readouterr().err
        assert not (tmp_path / "out" / "hf").exists()


def test_a_checkpoint_that_is_a_link_itself_is_read(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").symlink_to(sound["native"])
    assert run_command(["generate", str(tmp_path / "here"), "--tokens", "2"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(core_layers=10**9),
        lambda config: config["model"].update(dim=10**30),
        lambda config: config["model"].update(heads=0),
        lambda config: config["model"].update(vocab_size=-3),
        lambda config: config.update(model="large"),
    ],
)
def test_sizes_that_no_model_has_are_refused(
    change: Callable[[dict], None], sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "c"
    shutil.copytree(sound["native"], checkpoint)
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    change(config)
    replace_file(checkpoint, "config.yaml", yaml.safe_dump(config).encode())
    for words in list_commands(checkpoint, sound["config"], tmp_path / "out"):
        assert check_refused_or_done(words, tmp_path / "payload", capsys) == 1
