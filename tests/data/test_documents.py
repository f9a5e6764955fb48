"""Documents within a window: numbered exactly as in the shards, for the loader, the run and its evaluation alike."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.config import RunConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import Batch, BatchLoader, IndexedDataset, TokenCorpus, Tokenizer, read_fixed_windows
from megatron_rdt.data.corpus import read_window_share
from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, VERSION
from megatron_rdt.evaluate.loss import evaluate_checkpoint, measure_losses
from megatron_rdt.inference import load
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.train.trainer import train

LENGTH = 150


@pytest.fixture(scope="module")
def sharded(tiny_text: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    """The training split of a corpus of short documents in many small shards."""
    folder = tmp_path_factory.mktemp("short")
    with open(folder / "text.jsonl", "w") as file:
        for path in sorted(tiny_text.iterdir())[:12]:
            for paragraph in path.read_text().split("\n\n"):
                file.write(json.dumps({"text": paragraph}) + "\n")
    config = PrepConfig(
        sources=[str(folder)],
        out=str(folder / "corpus"),
        tokenizer=str(tiny_corpus / "tokenizer"),
        vocab_size=512,
        valid_fraction=0.2,
        shard_bytes=3000,
        workers=1,
    )
    return TokenCorpus(prepare(config), "train", LENGTH, seed=1, documents=True)


def test_numbers_are_those_of_the_stream_across_shards(sharded: TokenCorpus) -> None:
    lengths = [IndexedDataset(prefix).lengths for prefix in sharded.manifest.shard_prefixes("train")]
    assert len(lengths) > 3
    stream = np.repeat(np.arange(sum(map(len, lengths))), np.concatenate(lengths))
    offsets = np.cumsum([0, *map(np.sum, lengths)])
    samples = range(3 * sharded.samples_per_epoch)  # later epochs start anywhere
    starts = sharded.order.window_starts(np.asarray(samples))
    read = sharded.read_samples(samples)
    documents, windows = read.documents, read.tokens
    assert documents is not None
    assert documents.shape == windows.shape
    eos = Tokenizer(sharded.tokenizer_directory).eos
    straddling = 0
    for row, window, start in zip(documents, windows, starts):
        expected = stream[start : start + LENGTH + 1]
        assert np.array_equal(row.numpy(), expected - expected[0])
        assert torch.equal(row[1:] > row[:-1], window[:-1] == eos)  # here every document ends in the one EOS it has
        straddling += np.searchsorted(offsets, start, "right") < np.searchsorted(offsets, start + LENGTH, "right")
    assert straddling > 10
    third = sharded.locate_evenly(5)[2]
    expected = torch.from_numpy(stream[third:][: LENGTH + 1] - stream[third])
    assert torch.equal(read_fixed_windows(sharded, 5).documents[2], expected)
    shares = [read_window_share(sharded, 5, rank, 2).tokens for rank in range(2)]
    assert torch.equal(torch.cat(shares), read_fixed_windows(sharded, 5).tokens[:4])


def test_a_document_may_be_several_sequences_and_none(tmp_path: Path) -> None:
    lengths, documents = np.array([3, 2, 4, 1], "<i4"), np.array([0, 2, 2, 3, 4], "<i8")  # the second is empty
    pointers = np.array([0, 3, 5, 9], "<i8") * 2
    header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<u2")], len(lengths), len(documents))
    (tmp_path / "x.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    (tmp_path / "x.bin").write_bytes(np.arange(10, dtype="<u2").tobytes())
    assert IndexedDataset(tmp_path / "x").document_starts.tolist() == [0, 5, 9]


def test_the_loader_brings_documents_when_asked(sharded: TokenCorpus) -> None:
    loader = BatchLoader(sharded, BatchSchedule.constant(4), 1, 2, total_samples=8)
    batches = list(loader)
    loader.close()
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch.documents, sharded.read_samples(batch.samples).documents)
    plain = BatchLoader(
        TokenCorpus(sharded.manifest, "train", LENGTH, seed=1), BatchSchedule.constant(4), 1, 2, total_samples=8
    )
    assert [batch.documents for batch in plain] == [None, None]
    plain.close()


def test_a_run_and_its_evaluation_see_documents(
    configure: Callable[..., RunConfig], sharded: TokenCorpus, tmp_path: Path
) -> None:
    corpus = sharded.manifest.directory
    options = [
        f"--run.root={tmp_path}",
        f"--data.path={corpus}",
        f"--train.sequence_length={LENGTH}",
        "--train.steps=2",
        "--train.micro_batch=2",
        "--depth.scheme=fixed",
        "--eval.every=2",
        "--data.document_mask=true",
    ]
    config = configure(*options)
    assert train(config) == 0
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    windows = TokenCorpus(corpus, "train", LENGTH, config.run.seed, documents=True).read_samples(range(4))
    model = initialize(RecurrentDepthTransformer(config.model), config.run.seed)
    device = torch.device("cpu")
    masked = measure_losses(model, windows, [3], 4, device)[3]
    assert records[0]["loss"] == pytest.approx(masked, abs=1e-6)
    assert abs(measure_losses(model, Batch(windows.tokens), [3], 4, device)[3] - masked) > 1e-4
    evaluated = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["losses"]
    again = evaluate_checkpoint(str(run), [1, 3], config.eval.sequences)["losses"]
    trained, _ = load(run)
    valid = read_fixed_windows(TokenCorpus(corpus, "valid", LENGTH, 0, documents=True), config.eval.sequences)
    by_hand = measure_losses(trained, valid, [1, 3], 1, device)
    without = measure_losses(trained, Batch(valid.tokens), [1, 3], 1, device)
    for loops in (1, 3):
        assert evaluated[str(loops)] == pytest.approx(by_hand[loops], abs=1e-6)
        assert again[str(loops)] == pytest.approx(by_hand[loops], abs=1e-6)
        assert abs(without[loops] - by_hand[loops]) > 1e-4
