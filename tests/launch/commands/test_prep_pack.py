"""`rdt prep pack`: makes the packing plans of a corpus, prints their counts, refuses invalid options."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt.data import load_manifest
from megatron_rdt.data.packing_plan import make_plans, plan_path

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_plans_are_made_and_repaired(forked_rdt: Run, tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus, ignore=shutil.ignore_patterns("packing"))
    for words in ([], ["--sequence_length", "100"]):
        result = forked_rdt("prep", "pack", corpus, *words)
        length = int(words[1]) if words else 256
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == make_plans(load_manifest(corpus), "train", length).describe(length) + "\n"
    path = plan_path(load_manifest(corpus), "train", "shard-00000", 100)
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    assert forked_rdt("prep", "pack", corpus, "--sequence_length=100").returncode == 0
    assert path.read_bytes() == content


def test_invalid_options_are_refused(forked_rdt: Run, tiny_corpus: Path, tmp_path: Path) -> None:
    cases = (
        (["prep", "pack"], 2, "CORPUS is missing"),
        (["prep", "pack", tiny_corpus, "--sequence_length", "0"], 2, "--sequence_length is 0, it must be at least 1."),
        (["prep", "pack", tmp_path], 1, f"{tmp_path / 'manifest.json'} does not exist."),
    )
    for words, status, message in cases:
        result = forked_rdt(*words)
        assert result.returncode == status
        assert message in result.stderr
    helped = forked_rdt("prep", "pack", "--help").stdout
    assert helped.startswith("usage: rdt prep pack CORPUS [options]")
