"""Runs resumed with other weights, corpora or batch sizes: earlier samples stay, later ones follow from the checkpoint."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.config.mixture_weights import integer_weights
from megatron_rdt.data import Batch, BatchLoader, IndexedWriter, TokenCorpus, load_manifest
from megatron_rdt.data.mixture import schedule_turns
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import sha256_of
from megatron_rdt.train.data.prepared import PreparedData, open_prepared_data
from megatron_rdt.train.trainer import train
from tests.data.corpora import mixture_option
from tests.data.random_corpus import write_random_corpus

Configure = Callable[..., RunConfig]
LENGTH = 32
CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Record every batch that a run in this test takes."""
    taken: list[Batch] = []
    iterate = BatchLoader.__iter__

    def record_batches(self: BatchLoader) -> Iterator[Batch]:
        for batch in iterate(self):
            taken.append(batch)
            yield batch

    monkeypatch.setattr(BatchLoader, "__iter__", record_batches)
    return taken


def by_hand(corpora: dict[str, Path], phases: list[tuple[int, dict[str, int]]], samples: int) -> list[list[int]]:
    """Compute the window of every sample by counting the turns of the corpora one by one."""
    names = list(dict.fromkeys(name for _, counts in phases for name in counts))
    opened = {name: TokenCorpus(corpora[name], "train", LENGTH, 1234) for name in names}
    for number, name in enumerate(names):
        opened[name].order = opened[name].order.with_number(number)
    turns_of = {start: schedule_turns(list(counts.values())) for start, counts in phases}
    counters, windows = dict.fromkeys(names, 0), []
    for k in range(samples):
        start, counts = [phase for phase in phases if phase[0] <= k][-1]
        turns = turns_of[start]
        name = list(counts)[turns[(k - start) % len(turns)]]
        windows.append(opened[name].read_samples([counters[name]]).tokens[0].tolist())
        counters[name] += 1
    return windows


def test_a_rollback_keeps_the_weights_of_the_config(configure: Configure, corpora: dict[str, Path]) -> None:
    def open_data(**weights: int) -> PreparedData:
        return open_prepared_data(configure(mixture_option(corpora, **weights)), 1)

    at_first = json.loads(json.dumps(open_data(code=7, math=3).state(16)))
    data, again = open_data(code=1, math=1), open_data(code=1, math=1)
    data.resume(Path("runs/x/checkpoints/step-4"), at_first)
    later = json.loads(json.dumps(data.state(40)))
    assert data.resume(Path("runs/x/checkpoints/step-10"), later) == []
    assert data.shares == {"code": 0.5, "math": 0.5}
    data.resume(Path("runs/x/checkpoints/step-4"), at_first)
    again.resume(Path("runs/x/checkpoints/step-4"), at_first)
    assert data.history == again.history


def test_a_run_goes_on_with_other_weights_and_batches(
    configure: Configure,
    corpora: dict[str, Path],
    tmp_path: Path,
    seen: list[Batch],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [f"--run.root={tmp_path}", "--eval.every=0", "--checkpoint.every=0"]
    first = [*common, mixture_option(corpora, code=7, math=3), "--train.steps=4"]
    assert train(configure(*first)) == 0
    capsys.readouterr()
    # 4 x 4 samples; then 3 x 6 with other weights, then as before once more, then 2 x 2 with one corpus for another.
    second = [*common, mixture_option(corpora, code=1, math=1), "--train.steps=7", "--train.global_batch=6"]
    assert train(configure(*second), "auto") == 0
    said = capsys.readouterr().out
    assert "data mixture from sample 16 on: code 0.70 -> 0.50, math 0.30 -> 0.50\n" in said
    assert "train.global_batch 4 -> 6" in said
    assert train(configure(*second[:-2], "--train.steps=8", "--train.global_batch=6"), "auto") == 0
    assert "data mixture from" not in capsys.readouterr().out
    last = [*common, mixture_option(corpora, web=3, code=1), "--train.steps=10", "--train.global_batch=2"]
    assert train(configure(*last), "auto") == 0
    said = capsys.readouterr().out
    assert "data mixture from sample 40 on: code 0.50 -> 0.25, math 0.50 -> 0.00, web 0.00 -> 0.75\n" in said
    windows = {s: row.tolist() for batch in seen for s, row in zip(batch.samples, batch.tokens)}
    assert [sorted(batch.samples) for batch in seen] == [
        *([*range(at, at + 4)] for at in range(0, 16, 4)),
        *([*range(at, at + 6)] for at in range(16, 40, 6)),
        *([*range(at, at + 2)] for at in range(40, 44, 2)),
    ]
    phases = [(0, integer_weights({"code": 7, "math": 3})), (16, {"code": 1, "math": 1}), (40, {"web": 3, "code": 1})]
    assert [windows[k] for k in range(44)] == by_hand(corpora, phases, 44)
    state = checkpoints.read_trainer_state(tmp_path / "run" / "checkpoints" / "step-00000010")["data"]
    assert state["consumed_samples"] == 44
    assert [(phase["start"], dict(phase["counts"])) for phase in state["stages"]] == phases
    assert list(state["corpora"]) == ["code", "math", "web"]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(record["sources"].values()) == 44
    assert list(record["epochs"]) == ["web", "code"]


def test_any_sequence_of_resumes_sees_the_samples_of_one_run(configure: Configure, corpora: dict[str, Path]) -> None:
    generator = np.random.default_rng(7)
    config = configure(mixture_option(corpora, code=5, math=2, web=1), "--eval.every=0", "--train.global_batch=96")
    whole = open_prepared_data(config, 1).mixture.read_samples(range(1400)).tokens
    for _ in range(2):
        consumed, state = 0, None
        found = torch.empty_like(whole)
        while consumed < 800:
            world = int(generator.choice([1, 2, 3, 4, 6]))
            batch = world * int(generator.integers(1, 9))
            changed = configure(*_words(corpora), f"--train.global_batch={batch}")
            end = consumed + batch * int(generator.integers(1, 12))
            for rank in range(world):
                data = open_prepared_data(changed, world)
                if state is not None:
                    assert data.resume(Path("before"), state) == []
                loader = data.loader(consumed, end, rank, CPU)
                for part in loader:
                    found[list(part.samples)] = part.tokens
                loader.close()
            consumed, state = end, json.loads(json.dumps(data.state(end)))
        assert torch.equal(found[:consumed], whole[:consumed])


def _words(corpora: dict[str, Path]) -> list[str]:
    return [mixture_option(corpora, code=5, math=2, web=1), "--eval.every=0", "--data.max_epochs=1000"]


def resumed(configure: Configure, state: dict, *words: str) -> tuple[PreparedData, list[str]]:
    data = open_prepared_data(configure("--eval.every=0", *words), 1)
    return data, data.resume(Path("runs/x/step-1"), json.loads(json.dumps(state)))


def test_a_corpus_is_known_by_name_or_content(configure: Configure, corpora: dict[str, Path], tmp_path: Path) -> None:
    alone = open_prepared_data(configure(f"--data.path={corpora['code']}", "--eval.every=0"), 1)
    state = alone.state(100)
    # Moved and named otherwise.
    moved = Path(shutil.copytree(corpora["code"], tmp_path / "elsewhere"))
    data, changed = resumed(configure, state, f"--data.path={moved}")
    assert changed == []
    assert data.state(100)["stages"] == [{"start": 0, "counts": [("elsewhere", 1)]}]
    samples = np.arange(100, 300)
    assert torch.equal(data.mixture.read_samples(samples).tokens, alone.mixture.read_samples(samples).tokens)
    # From one corpus to a mixture and back; what it was of stays first.
    two = mixture_option(corpora, math=1, code=1)
    data, changed = resumed(configure, state, two)
    assert changed == ["data mixture from sample 100 on: code 1.00 -> 0.50, math 0.00 -> 0.50"]
    assert data.mixture.order.names == ["code", "math"]
    again, changed = resumed(configure, data.state(100), f"--data.path={corpora['code']}")
    assert changed == ["data mixture from sample 100 on: math 0.50 -> 0.00, code 0.50 -> 1.00"]
    assert [phase.start for phase in again.mixture.order.phases] == [0, 100], "no sample was taken of the one between"
    back, _ = resumed(configure, data.state(160), f"--data.path={corpora['code']}")
    counts = back.mixture.order.count_per_corpus(200)
    assert counts == {"code": 170, "math": 30}
    corpus, number = back.mixture.order.assign_corpora(np.array([160]))
    assert (corpus[0], number[0]) == (0, 130)
    # A corpus that was omitted for a while continues where it was.
    later, _ = resumed(configure, back.state(200), two)
    assert later.mixture.order.count_per_corpus(220) == {"code": 180, "math": 40}


def test_other_content_is_refused(configure: Configure, corpora: dict[str, Path], tmp_path: Path) -> None:
    state = open_prepared_data(configure(mixture_option(corpora, code=1, math=1), "--eval.every=0"), 1).state(100)
    changed = Path(shutil.copytree(corpora["code"], tmp_path / "code"))
    shard = changed / "train" / "shard-00001.bin"
    content = np.fromfile(shard, "<u2")
    content[:2] = content[1], content[0] + 1
    shard.write_bytes(content.tobytes())
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][1]["bin_sha256"] = sha256_of(shard)
    (changed / "manifest.json").write_text(json.dumps(manifest))
    other = {**corpora, "code": changed}
    with pytest.raises(
        CheckpointError, match=rf"other data than {changed} holds now .*shard train/shard-00001 has other"
    ):
        resumed(configure, state, mixture_option(other, code=1, math=1))
    with pytest.raises(CheckpointError, match=r"To add other data to it, give that another name in data\.mixture"):
        resumed(configure, state, mixture_option(other, code=1, math=1))
    entries = [
        {"path": str(changed), "weight": 1, "name": "better"},
        {"path": str(corpora["math"]), "weight": 1, "max_tokens": 900},
    ]
    with pytest.raises(CheckpointError, match=r"max_tokens 0 of .*math, now it is 900"):
        resumed(configure, state, f"--data.mixture={json.dumps(entries)}")
    del entries[1]["max_tokens"]
    _, said = resumed(configure, state, f"--data.mixture={json.dumps(entries)}")
    assert said == ["data mixture from sample 100 on: code 0.50 -> 0.00, better 0.00 -> 0.50"]
    with pytest.raises(CheckpointError, match=r"was trained with code and math, and .*web is none of them"):
        resumed(configure, state, f"--data.path={corpora['web']}")
    alone = open_prepared_data(configure(f"--data.path={corpora['math']}", "--eval.every=0"), 1).state(100)
    with pytest.raises(CheckpointError, match=r"other data than .*web holds now \(data_fingerprint\): shard train/"):
        resumed(configure, alone, f"--data.path={corpora['web']}")


def test_other_masks_are_refused(configure: Configure, tiny_corpus: Path, tmp_path: Path) -> None:
    """The same tokens with another mask are other data."""
    sizes = {"train": [5000], "valid": [900]}
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", sizes, masks=True)
    words = f"--data.path={corpus}", "--eval.every=0"
    state = open_prepared_data(configure(*words), 1).state(100)
    resumed(configure, state, words[0])
    mask = corpus / "train" / "shard-00000.mask"
    mask.write_bytes(bytes(1 - byte for byte in mask.read_bytes()))
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["mask_sha256"] = sha256_of(mask)
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="shard train/shard-00000 has other content"):
        resumed(configure, state, words[0])


def test_other_document_boundaries_are_refused_where_they_matter(
    configure: Configure, tiny_corpus: Path, tmp_path: Path
) -> None:
    """The tokens are the same, and with a document mask or packing the samples are not. Older checkpoints cannot tell."""
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [5000], "valid": [900]})
    words = f"--data.path={corpus}", "--eval.every=0"
    masked, plain = (*words, "--data.document_mask=true"), words
    states = {given: open_prepared_data(configure(*given), 1).state(100) for given in (masked, plain)}
    prefix = corpus / "train" / "shard-00000"
    tokens, vocab_size = np.fromfile(f"{prefix}.bin", "<u2"), load_manifest(corpus).vocab_size
    with IndexedWriter(prefix, vocab_size) as writer:
        for piece in np.array_split(tokens, load_manifest(corpus).document["splits"]["train"]["documents"]):
            writer.add_document(piece)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["idx_sha256"] = sha256_of(f"{prefix}.idx")
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"other \.idx files than .*c has now: the tokens are the same"):
        resumed(configure, states[masked], *masked)
    resumed(configure, states[plain], *plain)
    resumed(configure, states[plain], *masked)
    for record in states[masked]["corpora"].values():
        del record["documents"]
    resumed(configure, states[masked], *masked)
