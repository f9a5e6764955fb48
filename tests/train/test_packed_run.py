"""Runs on packed rows and on masked corpora: training, records, resume, refused options."""

import json
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch, PackedCorpus, load_manifest, open_corpus, read_fixed_windows
from megatron_rdt.data.mixture import Mixture, MixtureOrder, Phase
from megatron_rdt.data.shard_files.side_files import MASK
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.evaluate.loss import evaluate_checkpoint, measure_losses
from megatron_rdt.inference import load
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.train import trainer
from megatron_rdt.train.metrics import Console
from tests.data.random_corpus import write_random_corpus
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PACKED = ["--data.pack=bestfit", "--data.document_mask=true", "--data.document_positions=true"]
STEADY = ["--depth.scheme=fixed", "--train.steps=4", "--logging.every=1", "--eval.sequences=6"]


@pytest.fixture(scope="module")
def masked(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which about half of the tokens count."""
    folder = tmp_path_factory.mktemp("masked") / "corpus"
    sizes = {"train": [3000, 2500], "valid": [1500]}
    return write_random_corpus(folder, tiny_corpus / "tokenizer", sizes, masks=True)


def first_loss(config: RunConfig, windows: Batch) -> float:
    """Loss of the first step of a run: an untrained model on the first windows, whose order does not matter."""
    model = initialize(RecurrentDepthTransformer(config.model), config.run.seed)
    return measure_losses(model, windows, [int(config.depth.mean)], 1, CPU)[int(config.depth.mean)]


def samples(config: RunConfig, count: int) -> Batch:
    """The first `count` samples of the run's order."""
    manifest = load_manifest(config.data.path)
    return open_corpus(manifest, "train", config.train.sequence_length, config.run.seed, config.data).read_samples(
        range(count)
    )


@pytest.mark.parametrize("packing", [[], PACKED], ids=["chunk", "bestfit"])
def test_only_answers_count(
    packing: list[str], configure: Configure, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--run.root={tmp_path}", f"--data.path={masked}", *STEADY, *packing]
    config = configure(*options, "--run.name=answers")
    assert trainer.train(config) == 0
    windows = samples(config, 4)
    assert windows.loss_mask is not None
    share = float(windows.loss_mask[:, 1:].float().mean())
    assert 0.3 < share < 0.7
    records = read_records(tmp_path / "answers" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(first_loss(config, windows), abs=1e-6)
    everything = configure(*options, "--run.name=all", "--data.loss=all", "--train.steps=2", "--eval.every=0")
    assert trainer.train(everything) == 0
    record = read_records(tmp_path / "all" / "metrics.jsonl")[0]
    assert record["loss"] == pytest.approx(first_loss(everything, samples(everything, 4)), abs=1e-6)
    assert abs(record["loss"] - records[0]["loss"]) > 1e-4
    # Validation and `rdt eval`, over the targets that count of plain windows; bytes of these too.
    evaluated = read_records(tmp_path / "answers" / "eval.jsonl")[-1]["losses"]
    model, tokenizer = load(tmp_path / "answers")
    manifest = load_manifest(masked)
    valid = read_fixed_windows(open_corpus(manifest, "valid", 32, 0, config.data, pack=False), 6)
    assert valid.padding is None
    assert valid.loss_mask is not None
    by_hand = measure_losses(model, valid, [1, 3], 2, CPU)
    capsys.readouterr()
    result = evaluate_checkpoint(str(tmp_path / "answers"), [1, 3], 6)
    for loops in (1, 3):
        assert evaluated[str(loops)] == pytest.approx(by_hand[loops], abs=1e-6)
        assert result["losses"][str(loops)] == pytest.approx(by_hand[loops], abs=1e-6)
    counted = valid.tokens[:, 1:][valid.loss_mask[:, 1:]]
    assert result["bytes_per_token"] == pytest.approx(tokenizer.token_bytes()[counted.numpy()].mean())
    assert f"(6 sequences, {len(counted)} tokens)" in capsys.readouterr().out


def test_a_run_on_packed_rows(
    configure: Configure, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--run.root={tmp_path}",
        f"--data.path={masked}",
        "--data.loss=all",
        "--train.sequence_length=200",
        *STEADY,
        *PACKED,
    ]
    config = configure(*options, "--run.name=straight")
    assert trainer.train(config) == 0
    said = capsys.readouterr().out
    corpus = open_corpus(load_manifest(masked), "train", 200, config.run.seed, config.data)
    assert isinstance(corpus, PackedCorpus)
    assert corpus.counts.padding > 0
    assert corpus.counts.describe(200) in said
    rows = corpus.read_samples(range(16))
    assert rows.padding is not None
    records = read_records(tmp_path / "straight" / "metrics.jsonl")
    padding = [sum(rows.padding[4 * step : 4 * step + 4]) / (4 * 201) for step in range(4)]
    assert [record["padding"] for record in records] == pytest.approx(padding)
    assert any(padding)
    for record, share in zip(records, padding):
        assert ("padding" in Console(4, 0).format_line(record)) == (share > 0)
    assert records[0]["loss"] == pytest.approx(first_loss(config, rows.rows(0, 4)), abs=1e-6)
    # A run that is resumed in the middle continues with the same rows.
    source = tmp_path / "straight" / "checkpoints" / "step-00000002"
    assert json.loads((source / "trainer.json").read_text())["data"]["packing"] == "bestfit"
    assert trainer.train(configure(*options, "--run.name=resumed"), str(source)) == 0
    resumed = read_records(tmp_path / "resumed" / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in resumed] == [(r["step"], r["loss"]) for r in records[2:]]
    with pytest.raises(CheckpointError, match=r"with data\.pack bestfit, now it is chunk.*Set --data\.pack bestfit"):
        trainer.train(configure(*options, "--run.name=other", "--data.pack=chunk"), str(source))
    # Another run on windows evaluates on the same ones, and records no padding.
    plain = configure(*options, "--run.name=plain", "--data.pack=chunk")
    assert trainer.train(plain) == 0
    assert "padding" not in read_records(tmp_path / "plain" / "metrics.jsonl")[0]
    settings = [(tmp_path / name / "checkpoints" / "step-00000004") for name in ("straight", "plain")]
    windows = [
        read_fixed_windows(open_corpus(load_manifest(masked), "valid", 200, 1, c.data, pack=False), 6)
        for c in (config, plain)
    ]
    assert torch.equal(windows[0].tokens, windows[1].tokens)
    for name, checkpoint in zip(("straight", "plain"), settings):
        by_hand = measure_losses(load(checkpoint)[0], windows[0], [3], 1, CPU)[3]
        assert read_records(tmp_path / name / "eval.jsonl")[-1]["losses"]["3"] == pytest.approx(by_hand, abs=1e-6)


def test_positions_need_document_masks(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"data\.document_positions .* needs --data\.document_mask true"):
        configure("--data.document_positions=true")


def test_rows_cannot_keep_to_a_number_of_tokens(configure: Configure) -> None:
    mixture = "--data.mixture=[{path: a, weight: 1, max_tokens: 100}]"
    configure(mixture)
    with pytest.raises(
        ConfigError, match=r"entry 1 \(a\) has max_tokens 100, but data.pack bestfit packs all.*pack chunk"
    ):
        configure(mixture, "--data.pack=bestfit")


def test_in_a_mixture_every_batch_has_a_mask_if_any_has(configure: Configure, masked: Path, tiny_corpus: Path) -> None:
    """Otherwise ranks would disagree about a collective that counts targets."""
    data = configure().data
    corpora = {
        name: open_corpus(load_manifest(path), "train", 32, 1, data)
        for name, path in (("plain", tiny_corpus), ("masked", masked))
    }
    assert [corpora[name].has_loss_mask for name in ("plain", "masked")] == [False, True]
    mixture = Mixture(MixtureOrder([Phase(0, {"plain": 1, "masked": 1})]), corpora, 1)
    seen = set()
    for sample in range(8):
        windows = mixture.read_samples([sample])
        assert windows.loss_mask is not None
        assert windows.sources is not None
        seen.add((windows.sources[0], bool(windows.loss_mask.all())))
    assert seen == {(0, True), (1, False)}


def test_windows_in_which_nothing_counts_are_no_validation(configure: Configure, masked: Path, tmp_path: Path) -> None:
    config = configure(f"--data.path={masked}")
    corpus = open_corpus(load_manifest(masked), "valid", 32, 1, config.data)
    for shard in range(len(corpus._shards)):
        file = corpus._shards[shard].side_paths[MASK]
        before = file.read_bytes()
        file.write_bytes(bytes(len(before)))
        try:
            with pytest.raises(DataError, match=r"no token of 4 windows of split valid counts .* --data\.loss all"):
                read_fixed_windows(corpus, 4)
        finally:
            file.write_bytes(before)
