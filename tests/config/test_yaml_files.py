"""A config file that does not exist: the message names the file that was probably meant."""

from pathlib import Path

import pytest

from megatron_rdt.config import load_config
from megatron_rdt.config.yaml_files import read_mapping
from megatron_rdt.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with configs, and a folder of one's own."""
    for name in ("configs/quickstart.yaml", "configs/models/huginn_3_5b.yaml", "own/huginn_3_5b.yaml", "own/ds.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("configs/models/huginn_3.5b.yaml", "configs/models/huginn_3_5b.yaml"),
        ("configs/huginn_3_5b.yaml", "configs/models/huginn_3_5b.yaml"),
        ("own/huginn.yaml", "own/huginn_3_5b.yaml"),
        ("quickstat", "configs/quickstart.yaml"),
        ("no/such/folder/quickstart.yml", "configs/quickstart.yaml"),
        ("own/dss.json", "own/ds.json"),
    ],
)
def test_the_nearest_file_is_named(project: Path, given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config file {given} does not exist\. Did you mean {meant}\?$"):
        load_config(given)
    with pytest.raises(ConfigError, match=rf"Did you mean {project / meant}\?$"):
        load_config(project / meant.replace("5b", "5c").replace("start", "stat").replace("ds", "dss"))


def test_no_file_is_named_that_is_not_similar(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"^parallel.deepspeed: nothing.json does not exist\. Check the path\.$"):
        read_mapping("nothing.json", "parallel.deepspeed:", "--parallel.deepspeed")


@pytest.mark.parametrize("text", ["010", "-010", "00_10"])
def test_a_leading_zero_is_no_octal_number(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as 8."""
    file = tmp_path / "run.yaml"
    file.write_text(f"name: {text}\ncounts: [{text}, 1, 0, 0x10]\n")
    assert read_mapping(str(file)) == {"name": text, "counts": [text, 1, 0, 16]}


def test_an_option_takes_a_leading_zero_as_it_stands(tmp_path: Path, repository: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {name: 0123}\ntrain: {steps: 010}\neval: {loops: [1, 010]}\noptimizer: {lr: 01.5}\n")
    config = load_config(file)
    assert (config.run.name, config.train.steps, config.eval.loops) == ("0123", 10, [1, 10])
    assert config.optimizer.lr == 1.5
    assert load_config(file, ["--train.steps=020", "--eval.loops=1,020"]).eval.loops == [1, 20]
    file.write_text("run: {name: no}\n")
    with pytest.raises(ConfigError, match=r"key run\.name needs text, not 'False'\. Put it in quotes\."):
        load_config(file)
