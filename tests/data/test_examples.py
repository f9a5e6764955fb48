"""Labels and examples in shards: written, verified, imported, read as rows of their own and in groups to be scored."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.import_megatron import import_corpus
from megatron_rdt.config import DataConfig
from megatron_rdt.data import (
    Batch,
    ExampleCorpus,
    IndexedDataset,
    IndexedWriter,
    TokenCorpus,
    load_manifest,
    open_corpus,
)
from megatron_rdt.data.mixture import interleave
from megatron_rdt.data.shard_files.side_files import EXAMPLE
from megatron_rdt.data.shard_files.verify import verify_corpus
from megatron_rdt.data.task_examples import read_example_groups
from megatron_rdt.errors import ConfigError, DataError
from tests.data.corpora import ExampleDocument, write_example_corpus

BOS, EOS = 1, 2
TASKS = ["product:S3", "hops:4"]


def make_labelled(word: list[int], task: int = 0) -> ExampleDocument:
    """Document `BOS x1 ... xn EOS` whose label in the column after xi is 200 plus the sum of x1 ... xi."""
    tokens = [BOS, *word, EOS]
    sums = [200 + total for total in itertools.accumulate(word)]
    return ExampleDocument(tokens, tokens[:2] + sums, [0, 0] + [1] * len(word), task, len(word), 1)


def draw_words(generator: np.random.Generator, lengths: list[int]) -> list[ExampleDocument]:
    return [make_labelled(generator.integers(10, 16, length).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def examples(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards of words of 1 to 5 elements, and validation words of 2 to 12, with labels at every position."""
    generator = np.random.default_rng(1)
    splits = {
        "train": [draw_words(generator, [1, 2, 3, 4, 5] * 4), draw_words(generator, [2, 3] * 5)],
        "valid": [draw_words(generator, [2, 5, 12] * 6)],
    }
    return write_example_corpus(tmp_path_factory.mktemp("examples") / "corpus", tiny_corpus, splits, TASKS)


def expected_sums(tokens: list[int]) -> list[int]:
    return [200 + total for total in itertools.accumulate(tokens)]


def check_row(batch: Batch, row: int, difficulty: int) -> None:
    """Check that the targets that count in a row are the sums of the elements before them, and nothing else counts."""
    inputs, named = batch.rows(row, row + 1).inputs()
    word = inputs[0, 1 : 1 + difficulty].tolist()
    assert inputs[0, 0] == BOS
    assert all(10 <= element < 16 for element in word)
    mask = named["loss_mask"][0]
    assert mask.tolist() == [False] + [True] * difficulty + [False] * (len(mask) - 1 - difficulty)
    assert named["targets"][0, mask].tolist() == expected_sums(word)
    assert not set(expected_sums(word)) & set(inputs[0].tolist()), "no answer is in the input"


def test_labels_are_the_targets_of_a_batch() -> None:
    tokens, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 7, 8]])
    mask = torch.tensor([[False, False, True]])
    batch = Batch(tokens, labels=labels, loss_mask=mask, difficulties=(4,))
    assert batch.inputs()[1]["targets"].tolist() == [[7, 8]]
    assert batch.inputs()[0].tolist() == [[1, 2]]
    assert batch.counted_targets.tolist() == [8]
    assert batch.rows(0, 1).difficulties == (4,)
    assert batch.to(torch.device("cpu")).labels is not None
    merged = interleave(
        {0: batch, 1: Batch(tokens + 10, loss_mask=mask)},
        np.array(
            [
                1,
                0,
            ]
        ),
    )
    assert merged.inputs()[1]["targets"].tolist() == [[12, 13], [7, 8]], (
        "without labels the targets are the next tokens"
    )
    assert merged.difficulties == (0, 4)


def test_every_document_is_a_row_once_an_epoch(examples: Path) -> None:
    corpus = open_corpus(load_manifest(examples), "train", 7, 3, DataConfig(pack="example"))
    assert isinstance(corpus, ExampleCorpus)
    assert corpus.samples_per_epoch == 30
    batch = corpus.read_samples(range(30))
    assert batch.tokens.shape == (30, 8)
    assert batch.difficulties is not None
    assert sorted(batch.difficulties) == sorted([1, 2, 3, 4, 5] * 4 + [2, 3] * 5)
    for row, difficulty in enumerate(batch.difficulties):
        check_row(batch, row, difficulty)
    assert batch.padding == tuple(8 - 2 - difficulty for difficulty in batch.difficulties)
    rows = {tuple(row) for row in batch.tokens.tolist()}
    again = corpus.read_samples(range(30, 60))
    assert {tuple(row) for row in again.tokens.tolist()} == rows
    assert not torch.equal(again.tokens, batch.tokens), "in another order"


def test_rows_of_validation_are_as_long_as_needed(examples: Path) -> None:
    manifest, data = load_manifest(examples), DataConfig(pack="example")
    with pytest.raises(
        ConfigError, match=r"document 2 of split valid, of task product:S3 with difficulty 12, .* 13 to"
    ):
        open_corpus(manifest, "valid", 7, 3, data)
    valid = open_corpus(manifest, "valid", 7, 3, data, pack=False)
    assert valid.sequence_length == 14, "a multiple of the length of training"
    batch = valid.read(valid.locate_evenly(18))
    assert batch.difficulties == (2, 5, 12) * 6
    for row, difficulty in enumerate(batch.difficulties):
        check_row(batch, row, difficulty)
    assert open_corpus(manifest, "valid", 13, 3, data, pack=False).sequence_length == 13


def test_windows_and_data_loss_all(examples: Path) -> None:
    windows = TokenCorpus(examples, "train", 9, 0, loss_mask=True).read_samples(range(5))
    plain = TokenCorpus(examples, "train", 9, 0).read_samples(range(5))
    assert torch.equal(windows.tokens, plain.tokens)
    assert windows.labels is not None
    assert windows.loss_mask is not None
    assert bool((windows.labels[windows.loss_mask] >= 200).all())
    assert torch.equal(windows.labels[~windows.loss_mask], windows.tokens[~windows.loss_mask])
    assert plain.labels is None, "data.loss all ignores masks and labels"


def test_groups_to_score(examples: Path) -> None:
    groups = read_example_groups(examples, limit=4)
    assert [(group.task, group.difficulty, group.trained) for group in groups] == [
        ("product:S3", 2, True),
        ("product:S3", 5, True),
        ("product:S3", 12, False),
    ]
    for group in groups:
        assert len(group.batch) == 4
        inputs, named = group.batch.inputs()
        assert inputs.shape == (4, group.difficulty + 1), "rows of the group's own length"
        assert named["loss_mask"].sum(1).tolist() == [1] * 4, "the answer, not the labels before it"
        targets = named["targets"][named["loss_mask"]].tolist()
        assert targets == [expected_sums(row[1:])[-1] for row in inputs.tolist()]
    assert all(group.trained for group in read_example_groups(load_manifest(examples), "train"))


def test_a_task_without_training_examples_takes_the_difficulties_of_the_others(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    words = [make_labelled([10, 11]), make_labelled([10], task=1)]
    other = [make_labelled([12, 11], task=1), make_labelled([12, 13]), make_labelled([14] * 3, task=1)]
    only = write_example_corpus(tmp_path / "a", tiny_corpus, {"train": [words[:1]], "valid": [other]}, TASKS)
    both = write_example_corpus(tmp_path / "b", tiny_corpus, {"train": [words], "valid": [other]}, TASKS)
    trained = [[group.trained for group in read_example_groups(corpus)] for corpus in (only, both)]
    assert trained == [[True, True, False], [True, False, False]]


def test_corpora_without_examples_have_no_groups(tiny_corpus: Path) -> None:
    with pytest.raises(
        DataError, match=r"split valid of .* holds no examples of tasks\. Make some with `rdt prep tasks`"
    ):
        read_example_groups(tiny_corpus)


def write_document(path: Path, **side: np.ndarray) -> None:
    with IndexedWriter(path, 500) as writer:
        writer.add_document(np.array([1, 10, 11, 2]), "it", **side)


RECORD = np.array([(0, 3, 1)], EXAMPLE)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"labels": np.array([1, 10, 500, 2])}, "labels that are not one id below 500 for each of its 4 tokens"),
        ({"labels": np.array([1, 10, 2])}, "labels that are not one id"),
        ({"mask": np.array([1, 0, 0, 0]), "example": RECORD}, "an answer of 1 tokens, but 0 targets that count"),
        ({"example": np.array([(0, 3, 0)], EXAMPLE)}, "an answer of 0 tokens"),
    ],
)
def test_side_values_that_do_not_fit_are_refused(tmp_path: Path, side: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_document(tmp_path / "a", **side)
    assert not list(tmp_path.iterdir())


def test_all_documents_of_a_shard_have_labels_or_none(tmp_path: Path) -> None:
    tokens = np.array([1, 10, 2])
    with IndexedWriter(tmp_path / "a", 500) as writer:
        writer.add_document(tokens, labels=tokens)
        with pytest.raises(DataError, match="it has no row of labels, those before it have one"):
            writer.add_document(tokens, "it")
    write_document(tmp_path / "b", mask=np.array([0, 1, 1, 0]), labels=np.array([1, 7, 8, 2]), example=RECORD)
    shard = IndexedDataset(tmp_path / "b")
    assert shard.read_labels(1, 2).tolist() == [7, 8]
    assert shard.read_examples(0, 1).tolist() == [(0, 3, 1)]
    with pytest.raises(DataError, match=r"b\.examples ends at document 1 while documents up to 2"):
        shard.read_examples(0, 2)


def damage(examples: Path, copy: Path, suffix: str, offset: int, content: bytes) -> Path:
    """Copy a corpus with other bytes in one side file of its second training shard."""
    shutil.copytree(examples, copy)
    file = copy / f"train/shard-00001{suffix}"
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    file.write_bytes(data)
    return copy


@pytest.mark.parametrize(
    ("suffix", "offset", "content", "problem"),
    [
        (".labels", 2, b"\xff\xff", "labels: bytes 2 to 3 hold id 65535, vocab_size is"),
        (".labels", 4, b"\x0b", r"labels: bytes 0 to 89 differ from what was written"),
        (".examples", 0, b"\x09", r"examples: from byte 0 on: record 0 has task 9 of 2 and an answer of 1 tokens"),
        (".examples", 1000, b"\x00", r"examples: it has 101 bytes, the shard has 10 documents"),
    ],
)
def test_verify_names_damage_of_side_files(
    examples: Path, tmp_path: Path, suffix: str, offset: int, content: bytes, problem: str
) -> None:
    assert not verify_corpus(examples)
    findings = "\n".join(map(str, verify_corpus(damage(examples, tmp_path / "c", suffix, offset, content))))
    assert re.search(problem, findings), findings
    with pytest.raises(DataError, match=f"shard-00001{suffix}"):
        load_manifest(tmp_path / "c").verify("full")


def test_a_label_outside_the_vocabulary_stops_reading(examples: Path, tmp_path: Path) -> None:
    corpus = damage(examples, tmp_path / "c", ".labels", 2, b"\xff\xff")
    with pytest.raises(DataError, match=r"holds label 65535 near document 20, but vocab_size is"):
        open_corpus(load_manifest(corpus), "train", 7, 3, DataConfig(pack="example")).read(np.array([0, 20]))


def test_a_missing_side_file_is_an_error(examples: Path, tmp_path: Path) -> None:
    corpus = damage(examples, tmp_path / "c", ".labels", 0, b"\x01")
    before = load_manifest(examples).fingerprint
    assert load_manifest(corpus).fingerprint == before
    (corpus / "train/shard-00001.labels").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.labels is missing"):
        load_manifest(corpus).verify()


def test_import_takes_labels_examples_and_tasks_along(examples: Path, tmp_path: Path) -> None:
    shards = [str(examples / f"train/shard-0000{number}") for number in range(2)]
    valid = [str(examples / "valid/shard-00000")]
    out = import_corpus(shards, str(examples / "tokenizer"), str(tmp_path / "out"), valid)
    manifest = load_manifest(out)
    assert manifest.tasks == TASKS
    assert not verify_corpus(out)
    assert manifest.shard_hashes == load_manifest(examples).shard_hashes
    groups, before = read_example_groups(out), read_example_groups(examples)
    assert [torch.equal(a.batch.tokens, b.batch.tokens) for a, b in zip(groups, before, strict=True)] == [True] * 3
    lone = tmp_path / "lone" / "train"
    lone.mkdir(parents=True)
    for file in (examples / "train").glob("shard-00000.*"):
        (lone / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ConfigError, match=r"shard-00000\.examples refers to tasks by number, and there is no .*manifest"
    ):
        import_corpus([str(lone / "shard-00000")], str(examples / "tokenizer"), str(tmp_path / "out2"))
