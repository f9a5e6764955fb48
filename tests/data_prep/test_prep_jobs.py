"""Prep as a job: Hugging Face datasets, a kill in the middle, an existing tokenizer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.data import IndexedDataset, Tokenizer
from megatron_rdt.errors import DataError

OPTIONS = {"vocab_size": 512, "valid_fraction": 0.2, "workers": 1}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the manifest, which names `out`, by relative path."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def texts_of(corpus: Path) -> set[str]:
    tokenizer = Tokenizer(corpus / "tokenizer")
    found = set()
    for split in ("train", "valid"):
        dataset = IndexedDataset(corpus / split / "shard-00000")
        found |= {tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset))}
    return found


def test_hugging_face_dataset_from_a_local_path(tiny_text: Path, tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(tiny_text.glob("*.py"))]
    texts = [text for text in texts if text.strip()]
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = [json.dumps({"body": text, "other": i}) + "\n" for i, text in enumerate(texts)]
    (folder / "part.jsonl").write_text("".join(lines))
    source = f"hf:{folder}"
    out = prepare(PrepConfig(sources=[source], out=str(tmp_path / "out"), text_field="body", **OPTIONS))
    assert texts_of(out) == set(texts)
    missing = PrepConfig(sources=[f"hf:{tmp_path / 'nowhere'}"], out=str(tmp_path / "none"), **OPTIONS)
    with pytest.raises(DataError, match="could not be read as a dataset"):
        prepare(missing)
    assert not (tmp_path / "none").exists()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_killed_and_started_again_gives_the_same_bytes(tiny_text: Path, tmp_path: Path, repository: Path) -> None:
    options = {**OPTIONS, "sources": [str(tiny_text)]}
    straight = prepare(PrepConfig(out=str(tmp_path / "straight"), **options))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "launch.cli", "prep", "--sources", json.dumps([str(tiny_text)]), "--out", str(out)]
    command += ["--vocab_size", "512", "--valid_fraction", "0.2", "--workers", "2"]
    for after in ("tokenizer", "spill.bin"):
        process = subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / ".killed.prep" / after).exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    subprocess.run(command, cwd=repository, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert contents(out) == contents(straight)
    assert os.listdir(tmp_path).count(".killed.prep") == 0


def test_an_existing_tokenizer_is_used(tiny_text: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "tokenizer": str(tiny_corpus / "tokenizer")}
    out = prepare(PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "again"), **options))
    assert Tokenizer(out / "tokenizer").fingerprint == Tokenizer(tiny_corpus / "tokenizer").fingerprint
    assert contents(out)["train/shard-00000.bin"] == contents(tiny_corpus)["train/shard-00000.bin"]
