"""Fixtures that several test files share."""

import gc
import json
import os
import shutil
import signal
import sysconfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer
from data_prep.stages.tokenizer.write_tokenizer import write_tokenizer
from megatron_rdt.config import RunConfig, check_config, load_config

REPOSITORY = Path(__file__).resolve().parent.parent
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 4 << 30
LONGEST = (
    "test_docs.py",
    "distributed/test_every_choice.py",
    "distributed/test_axes.py",
    "distributed/test_resume.py",
    "model/test_compiling.py",
    "distributed/test_collectives.py",
    "distributed/test_engines.py",
    "checkpoint/test_interrupted_save.py",
    "launch/test_workers.py",
    "distributed/test_planner.py",
    "distributed/test_experts.py",
    "distributed/test_axes_runs.py",
    "model/test_injection.py",
    "distributed/test_compile.py",
    "launch/commands/test_plan.py",
    "distributed/test_world_size.py",
    "launch/test_cli.py",
    "convert/test_training_state.py",
    "model/test_activation_checkpointing.py",
    "distributed/test_deepspeed.py",
)
"""Test files that take the longest, longest first: a file that starts last should be short."""

torch.set_num_threads(1)

# A shell ignores Ctrl-C in what it starts in the background, and every process of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

CLUSTER_TESTS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some packages of the standard library, one document per file: text that a change here leaves alone."""
    folder = tmp_path_factory.mktemp("text")
    for package in ("email", "json", "logging", "urllib", "wsgiref"):
        for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).glob("*.py")):
            (folder / f"{package}-{path.name}").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus with a vocabulary of 512."""
    out = tmp_path_factory.mktemp("prepared") / "tiny"
    return prepare(PrepConfig(sources=[str(tiny_text)], out=str(out), vocab_size=512, valid_fraction=0.2, workers=1))


@pytest.fixture(scope="session")
def tokenizer_folders(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with small tokenizers: "bpe" and "unigram" as prep trains them, "hf" a byte-level one like GPT-2's."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir())]
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "unigram"):
        options = PrepConfig(tokenizer_type=kind, vocab_size=640, tokenizer_sample_bytes=200_000)  # type: ignore[arg-type]
        write_tokenizer(train_tokenizer(texts, options), root / kind, [])
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.post_processor = tokenizers.processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 0)])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        (text[:10_000] for text in texts),
        tokenizers.trainers.BpeTrainer(
            vocab_size=512, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    model.add_tokens(["<tool>"])
    (root / "hf").mkdir()
    model.save(str(root / "hf" / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|pad|>"}
    (root / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    specials = {"eos_token": {"content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False}}
    (root / "hf" / "special_tokens_map.json").write_text(json.dumps(specials))
    return {kind: root / kind for kind in ("bpe", "unigram", "hf")}


@pytest.fixture(scope="session")
def byte_corpus(tiny_text: Path, tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus prepared with the tokenizer "hf"."""
    out, tokenizer = tmp_path_factory.mktemp("prepared") / "bytes", str(tokenizer_folders["hf"])
    return prepare(
        PrepConfig(sources=[str(tiny_text)], out=str(out), tokenizer=tokenizer, valid_fraction=0.2, workers=1)
    )


@pytest.fixture(scope="session")
def tiny_options(tiny_corpus: Path) -> list[str]:
    """Options of a training run that takes a second or two."""
    options = {
        "model.vocab_size": 512,
        "model.dim": 32,
        "model.core_layers": 1,
        "model.heads": 4,
        "model.kv_heads": 2,
        "depth.mean": 3,
        "depth.max": 6,
        "train.steps": 8,
        "train.global_batch": 4,
        "train.micro_batch": 1,
        "train.sequence_length": 32,
        "train.device": "cpu",
        "schedule.warmup_steps": 2,
        "checkpoint.every": 2,
        "data.path": str(tiny_corpus),
        "data.max_epochs": 100,
        "eval.every": 4,
        "eval.loops": "[1,3]",
        "eval.sequences": 4,
        "logging.tensorboard": "false",
    }
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="session")
def configure(tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """The checked config of a tiny run, with more options."""
    empty = tmp_path_factory.mktemp("config") / "empty.yaml"
    empty.write_text("{}\n")

    def build(*words: str) -> RunConfig:
        config = load_config(empty, [*tiny_options, *words])
        check_config(config, 1)
        return config

    return build


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first where workers take whole files from a queue, so that none is started last."""
    if hasattr(config, "workerinput"):
        places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST)}
        several = {item.path for item in items if item.get_closest_marker("distributed")}
        items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in several))


def pytest_configure() -> None:
    """Keep temporary files in memory where there is room: thousands are synchronised, which takes a disk minutes."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_finish() -> None:
    """Exclude the objects that imports left behind from later garbage collections: every run of the trainer starts one."""
    gc.collect()
    gc.freeze()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember the cluster tests that the command line deselected."""
    for item in items:
        if item.get_closest_marker("cluster") and not item.config.option.keyword:
            item.config.stash.setdefault(CLUSTER_TESTS, []).append(item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report how many cluster tests did not run; pytest's own -ra lists the skipped tests with their reasons."""
    left_out = config.stash.get(CLUSTER_TESTS, [])
    if left_out:
        terminalreporter.section("not run")
        terminalreporter.line(f"{len(left_out)} tests need Slurm; `make test-cluster` starts one and runs them.")
