"""A corpus that is replaced while it is read: other content stops the reader, a copy of the same content does not."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import run_command
from megatron_rdt.config import DataConfig
from megatron_rdt.data import CorpusManifest, IndexedDataset, IndexedWriter, TokenCorpus, load_manifest, open_corpus
from megatron_rdt.data.packing_plan import make_plans, plan_path
from megatron_rdt.data.shard_files import corpus_manifest
from megatron_rdt.data.shard_files.block_hashes import hash_shard
from megatron_rdt.data.shard_files.open_shards import Shards
from megatron_rdt.errors import DataError
from megatron_rdt.train.data import prepared
from megatron_rdt.train.trainer import Trainer
from tests.data.random_corpus import write_random_corpus

pytestmark = pytest.mark.slow

LENGTH, SHARDS, MAX_OPEN = 32, 12, 2


@pytest.fixture(scope="module")
def original(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of many shards with masks."""
    folder = tmp_path_factory.mktemp("original") / "corpus"
    sizes = {"train": [5000 + 100 * number for number in range(SHARDS)], "valid": [3000]}
    return write_random_corpus(folder, tiny_corpus / "tokenizer", sizes, masks=True)


@pytest.fixture(scope="module")
def other(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same corpus with the documents of every shard in reverse order: files of the same sizes and other content."""
    folder = tmp_path_factory.mktemp("other") / "corpus"
    shutil.copytree(original, folder)
    document = json.loads((original / "manifest.json").read_text())
    for split, content in document["splits"].items():
        for record in content["shards"]:
            source, prefix = IndexedDataset(original / split / record["name"]), folder / split / record["name"]
            starts = source.document_starts
            with IndexedWriter(prefix, document["vocab_size"]) as writer:
                for start, end in reversed(list(zip(starts, [*starts[1:], source.tokens]))):
                    mask = source.read_mask(int(start), int(end - start))
                    writer.add_document(source.read(int(start), int(end - start)), mask=mask)
            source.close()
            record.update(hash_shard(prefix))
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def live(original: Path, tmp_path: Path) -> Path:
    """The corpus that is read."""
    return Path(shutil.copytree(original, tmp_path / "corpus"))


def publish(source: Path, live: Path) -> None:
    """Replace the corpus as `rdt prep --restart` does."""
    shutil.copytree(source, live.with_name("new"))
    live.rename(live.with_name("replaced"))
    live.with_name("new").rename(live)
    shutil.rmtree(live.with_name("replaced"))


def replace_files(source: Path, live: Path, suffix: str) -> None:
    """Replace the files of this suffix of all training shards, as rsync does."""
    for path in sorted((live / "train").glob(f"*{suffix}")):
        shutil.copyfile(source / "train" / path.name, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def open_live(live: Path) -> TokenCorpus:
    return TokenCorpus(live, "train", LENGTH, seed=1, documents=True, loss_mask=True, max_open=MAX_OPEN)


def read_all(corpus: TokenCorpus) -> list[torch.Tensor]:
    batch = corpus.read_samples(range(corpus.samples_per_epoch))
    assert batch.documents is not None
    assert batch.loss_mask is not None
    return [batch.tokens, batch.documents, batch.loss_mask]


@pytest.mark.parametrize("read_before", [True, False], ids=["opened again", "opened late"])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask", "all"])
def test_other_content_stops_the_reader(live: Path, other: Path, suffix: str, read_before: bool) -> None:
    corpus = open_live(live)
    if read_before:
        read_all(corpus)
    if suffix == "all":
        publish(other, live)
    else:
        replace_files(other, live, suffix)
    changed = ".bin" if suffix == "all" else suffix
    message = (
        r"corpus was replaced or changed while it was being read: shard train/shard-000\d\d is not the one that was "
        rf"there before \(.*/train/shard-000\d\d\{changed} has other content\)\. Put the former corpus back and resume"
    )
    with pytest.raises(DataError, match=message):
        read_all(corpus)
    with pytest.raises(DataError, match=message):  # a second look does not make it the right one
        read_all(corpus)
    corpus.close()


def test_shards_that_are_open_are_read_to_the_end(live: Path, original: Path, other: Path) -> None:
    corpus = TokenCorpus(live, "train", LENGTH, seed=1, documents=True, loss_mask=True, max_open=SHARDS)
    expected = read_all(corpus)
    publish(other, live)
    assert all(map(torch.equal, read_all(corpus), expected))
    corpus.close()


def test_a_shard_that_is_gone_is_explained(live: Path) -> None:
    corpus = open_live(live)
    shutil.rmtree(live / "train")
    with pytest.raises(
        DataError, match=r"was replaced or changed .*/shard-000\d\d\.\w+ does not exist\)\. Put the former"
    ):
        read_all(corpus)


def test_a_manifest_that_was_not_verified_remembers_the_first_opening(live: Path, other: Path) -> None:
    manifest = CorpusManifest(live, json.loads((live / "manifest.json").read_text()))
    corpus = TokenCorpus(manifest, "train", LENGTH, seed=1, max_open=MAX_OPEN)
    corpus.read_samples(range(corpus.samples_per_epoch))
    publish(other, live)
    with pytest.raises(DataError, match="was replaced or changed while it was being read"):
        corpus.read_samples(range(corpus.samples_per_epoch))


def test_a_copy_of_the_same_content_is_accepted(live: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    hash_whole = corpus_manifest.sha256_of

    def record(path: Path) -> str:
        hashed.append(path)
        return hash_whole(path)

    monkeypatch.setattr(corpus_manifest, "sha256_of", record)
    corpus = open_live(live)
    expected = read_all(corpus)
    for path in (live / "train").iterdir():
        path.chmod(0o444)
    read_all(corpus)
    assert hashed == [], "nothing is hashed while the files are the same"
    publish(original, live)
    for _ in range(3):
        assert all(map(torch.equal, read_all(corpus), expected))
    assert len(hashed) == 3 * SHARDS, "every file once"
    corpus.close()


def test_an_index_that_is_searched_on_disk_is_the_shards_own(live: Path, original: Path, other: Path) -> None:
    shards = Shards(load_manifest(live), "train", cached_documents=0)
    expected = shards.document_starts(3, 0, 5000)
    assert len(expected)
    publish(original, live)
    assert np.array_equal(shards.document_starts(3, 0, 5000), expected)
    publish(other, live)
    with pytest.raises(DataError, match=r"shard train/shard-00003 is not the one that was there before"):
        shards.document_starts(3, 0, 5000)
    shards.close()


def test_an_index_that_is_replaced_under_an_open_shard_is_refused(live: Path, other: Path) -> None:
    dataset = IndexedDataset(live / "train" / "shard-00003")
    assert len(dataset.lengths)
    replace_files(other, live, ".idx")
    with pytest.raises(DataError, match=r"shard-00003\.idx was replaced while in use\. Put the former corpus back"):
        _ = dataset.documents
    dataset.close()


def test_a_packing_plan_of_another_corpus_stops_the_reader(live: Path, other: Path) -> None:
    make_plans(load_manifest(live), "train", LENGTH)
    manifest = load_manifest(live)
    manifest.verify()
    corpus = open_corpus(manifest, "train", LENGTH, 1, DataConfig(pack="bestfit"), max_open=MAX_OPEN)
    expected = corpus.read(np.arange(corpus.samples_per_epoch))
    publish(other, live)
    with pytest.raises(DataError, match=r"\.pack was removed while it was being read\. Put the former corpus back"):
        corpus.read(np.arange(corpus.samples_per_epoch))
    make_plans(load_manifest(live), "train", LENGTH)
    with pytest.raises(DataError, match=r"\.pack is not the plan that was there before: the corpus was replaced"):
        corpus.read(np.arange(corpus.samples_per_epoch))
    corpus.close()
    assert len(expected) == corpus.samples_per_epoch


def test_a_plan_that_was_made_again_is_the_same(live: Path) -> None:
    make_plans(load_manifest(live), "train", LENGTH)
    corpus = open_corpus(load_manifest(live), "train", LENGTH, 1, DataConfig(pack="bestfit"), max_open=MAX_OPEN)
    expected = corpus.read(np.arange(corpus.samples_per_epoch)).tokens
    for record in load_manifest(live).document["splits"]["train"]["shards"]:
        plan_path(load_manifest(live), "train", record["name"], LENGTH).unlink()
    make_plans(load_manifest(live), "train", LENGTH)
    assert torch.equal(corpus.read(np.arange(corpus.samples_per_epoch)).tokens, expected)
    corpus.close()


def test_a_corpus_that_is_replaced_while_it_is_opened_is_refused(live: Path, original: Path, other: Path) -> None:
    manifest = load_manifest(live)
    publish(original, live)
    manifest.verify()
    publish(other, live)
    with pytest.raises(DataError, match=r"corpus was replaced while it was being opened\. Start again"):
        manifest.verify()


def test_a_run_stops_and_resumes_on_the_former_corpus(
    tiny_options: list[str],
    live: Path,
    original: Path,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"data.path": live, "train.steps": 30, "eval.every": 0, "depth.scheme": "fixed", "depth.mean": 1}
    words = [*tiny_options, *(f"--{name}={value}" for name, value in options.items())]
    monkeypatch.setattr(prepared, "open_shards_limit", lambda: MAX_OPEN)

    def train(name: str, *more: str) -> int:
        return run_command(["train", *words, f"--run.root={tmp_path / name}", "--run.name=run", *more])

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert train("whole") == 0
    save = Trainer._save_checkpoint

    def save_and_replace(trainer: Trainer, **options: Any) -> None:
        save(trainer, **options)
        if trainer.step == 4:
            publish(other, live)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_replace)
    capsys.readouterr()
    assert train("parts") == 1
    assert "corpus was replaced or changed while it was being read: shard train/shard-000" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    assert train("parts", "--resume=auto") == 1
    assert "has other content" in capsys.readouterr().err
    publish(original, live)
    assert train("parts", "--resume=auto") == 0
    assert losses("parts") == losses("whole")
    assert len(losses("whole")) == 30
