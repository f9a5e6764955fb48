"""The command line: help that explains every option, one syntax for options, no heavy imports, quiet output."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import megatron_rdt
from launch.cli import COMMANDS
from launch.commands.convert import ConvertOptions
from launch.commands.eval import EvalOptions
from launch.slurm_job import SubmitOptions
from launch.train_options import parse_worker, select_worker_words
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.config.parser import make_parser, option_kinds, parse
from megatron_rdt.errors import ConfigError

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "matplotlib", "dask", "distributed"}
# Python terms that a user should not see.
INTERNALS = ("<class", "typing", "Literal", "Union", "Namespace", "jsonargparse", "null", "[ITEM", "local_rank")


def parse_help(help_text: str) -> dict[str, str]:
    """Return the explanation of each option or argument of a help text."""
    entries = re.split(r"\n  (?=\S)", help_text)[1:]
    explained = {}
    for entry in entries:
        name, _, text = re.sub(r"\n(?!\n)\s+", "  ", entry.split("\n\n")[0]).partition("  ")
        explained[name.split()[0].rstrip(",")] = text.strip()
    return explained


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name: str, rdt: Run) -> None:
    result = rdt(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: rdt {name}")
    assert not [word for word in INTERNALS if word in result.stdout]
    explained = parse_help(result.stdout)
    assert "-h" in explained
    assert not [option for option, text in explained.items() if len(text) < 10]


def test_help_of_train_has_every_field(rdt: Run, repository: Path) -> None:
    explained = parse_help(rdt("train", "--help").stdout)
    fields = {f"--{name}" for name in option_kinds(RunConfig) if "." in name}
    assert len(fields) > 50
    assert set(explained) == fields | {
        "-h",
        "--config",
        "--print_config",
        "--resume",
        "--init",
        "--nproc",
        "--master_port",
    }
    assert explained["--model.norm_eps"] == "Epsilon of every RMSNorm. (default: 1e-06)"
    assert explained["--eval.loops"].endswith("(default: 1,4,8)")
    script = [sys.executable, str(repository / "launch" / "pretrain.py"), "--help"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60).stdout
    assert parse_help(shown) == {k: v for k, v in explained.items() if k not in ("--nproc", "--master_port")}


def test_positional_arguments_are_explained(rdt: Run) -> None:
    for name, arguments in (("eval", ["CHECKPOINT"]), ("convert", ["SOURCE", "OUT"]), ("report", ["RUN"])):
        text = rdt(name, "-h").stdout
        assert text.startswith(f"usage: rdt {name} {' '.join(arguments)} [options]")
        assert all(argument in parse_help(text) for argument in arguments)


def test_the_command_alone(rdt: Run) -> None:
    helped = rdt("--help")
    assert helped.returncode == 0
    assert all(re.search(rf"^  {name} +\w.*\.$", helped.stdout, re.MULTILINE) for name in COMMANDS)
    bare = rdt()
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", helped.stdout)
    assert rdt("--version").stdout == f"rdt {megatron_rdt.__version__}\n"


def test_print_config_is_read_back(rdt: Run, tmp_path: Path) -> None:
    words = ["--config", "configs/smoke.yaml", "--depth.mean", "5", "--resume", "auto", "--nproc", "2"]
    printed = rdt("train", *words, "--print_config")
    assert (printed.returncode, printed.stderr) == (0, "")
    path = tmp_path / "printed.yaml"
    path.write_text(printed.stdout)
    config = load_config(path)
    assert config == load_config("configs/smoke.yaml", {"depth.mean": 5})
    assert set(yaml.safe_load(printed.stdout)) == set(vars(config))
    assert rdt("train", "--config", path, "--print-config").stdout == printed.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "c.yaml", "--nodes", "3", "--dry-run"],
        ["--dry-run", "--config=c.yaml", "--nodes=3"],
        ["--dry_run", "true", "--config", "c.yaml", "--nodes", "3"],
        ["--dry-run=true", "--nodes", "3", "--config", "c.yaml"],
    ],
)
def test_one_rule_for_dashes_and_booleans(words: list[str]) -> None:
    parser = make_parser(SubmitOptions, "rdt submit", "", config_file=False)
    job, _ = parse(parser, SubmitOptions, words)
    assert (job.config, job.nodes, job.dry_run) == ("c.yaml", 3, True)
    assert not parse(parser, SubmitOptions, ["--config", "c.yaml", "--dry-run", "false"])[0].dry_run
    job, _ = parse(parser, SubmitOptions, ["--config", "c", "--overrides", "--depth.mean 8", "--time", "1:30:00"])
    assert (job.overrides, job.time) == ("--depth.mean 8", "1:30:00")


def test_options_before_and_after_positional_arguments() -> None:
    parser = make_parser(ConvertOptions, "rdt convert", "", config_file=False, positional=True)
    for words in ("a b --to zero", "--to zero a b", "a --to=zero b"):
        assert parse(parser, ConvertOptions, words.split())[0] == ConvertOptions("a", "b", "zero")


@pytest.mark.parametrize("value", ["1,4", "[1,4]", "[1, 4]", "1, 4"])
def test_lists_with_and_without_brackets(value: str) -> None:
    parser = make_parser(EvalOptions, "rdt eval", "", config_file=False, positional=True)
    assert parse(parser, EvalOptions, ["c", "--loops", value])[0].loops == [1, 4]
    assert load_config("configs/smoke.yaml", [f"--eval.loops={value}"]).eval.loops == [1, 4]


def test_workers_get_all_but_the_launcher_options() -> None:
    words = [
        "--config",
        "configs/smoke.yaml",
        "--nproc",
        "2",
        "--master-port=5",
        "--resume",
        "auto",
        "--init",
        "runs/a",
    ]
    kept = select_worker_words(words)
    assert kept == ["--config=configs/smoke.yaml", "--resume=auto", "--init=runs/a"]
    _, options = parse_worker("pretrain.py", ["--local-rank=1", *kept])  # as the DeepSpeed launcher does
    assert (options.resume, options.init, options.local_rank) == ("auto", "runs/a", 1)


def test_overrides_may_be_nested() -> None:
    nested = load_config("configs/smoke.yaml", {"model": {"dim": 32, "heads": 2}, "run.name": "5", "eval.loops": [2]})
    assert (nested.model.dim, nested.model.heads, nested.run.name, nested.eval.loops) == (32, 2, "5", [2])
    with pytest.raises(ConfigError, match=r"--model is a section. Set its fields, such as model\.vocab_size"):
        load_config("configs/smoke.yaml", {"model": 5})


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["prep", "--help"],
        ["train", "--help"],
        ["train", "--depth.meen", "3"],
        ["train", "--model.heads", "3"],
        ["train", "--data.path", "/nonexistent", "--parallel.engine", "fsdp"],
        ["submit", "--help"],
        ["generate"],
    ],
    ids=" ".join,
)
def test_answers_without_heavy_imports(words: list[str], repository: Path) -> None:
    code = (
        "import sys; from launch import cli; sys.argv = ['rdt', *sys.argv[1:]]\n"
        "try: status = cli.main()\nexcept SystemExit as done: status = done.code\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=True)
    loaded = set(result.stderr.splitlines()[-1].split())
    assert "jsonargparse" in loaded
    assert not loaded & HEAVY


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine", ["single", "fsdp", "zero3"])
def test_training_prints_only_its_own_lines(
    engine: str, rdt: Run, tmp_path: Path, tiny_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")  # an engine on the CPU does not let DeepSpeed choose another device
    options = [*tiny_options, f"--run.root={tmp_path}", f"--parallel.engine={engine}", "--train.steps=4"]
    result = rdt("train", *options, "--sample.every=4", "--sample.tokens=4", timeout=180)
    assert (result.returncode, result.stderr) == (0, "")
    ours = (rf"{re.escape(str(tmp_path))}/run: ", r"step \d+: ", r"\[[#.]{10}\] step 4/4  loss ", "done: 4 steps")
    lines = result.stdout.splitlines()
    assert not [line for line in lines if not re.match("|".join(ours), line)]
    assert lines[-1].startswith("done: 4 steps")


def test_a_reader_that_leaves_early_is_no_error(repository: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "--help"]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, "")
