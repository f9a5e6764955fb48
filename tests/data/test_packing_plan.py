"""Packing: every target once, no row too long, rows as by textbook best-fit decreasing; damaged plans are refused."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rdt.config import DataConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader, CorpusManifest, IndexedWriter, PackedCorpus, open_corpus
from megatron_rdt.data import packing_plan as packing_module
from megatron_rdt.data.packing_plan import (
    HEADER,
    PIECE,
    PackingPlan,
    PlanCounts,
    best_fit,
    make_plans,
    pack_shard,
    plan_path,
)
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of

EOS, VOCABULARY = 2, 1000
documents = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Compute the room left in each row by best-fit decreasing, one piece after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [room for room in rooms if room >= length]
        if enough:
            rooms.remove(min(enough))
        rooms.append((min(enough) if enough else capacity) - length)
    return sorted(rooms)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """Find the smallest number of rows by trying every assignment."""
    best = len(lengths)

    def assign(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for row in range(len(rooms)):
            if rooms[row] >= lengths[index]:
                assign(index + 1, [*rooms[:row], rooms[row] - lengths[index], *rooms[row + 1 :]])
        assign(index + 1, [*rooms, capacity - lengths[index]])

    assign(0, [])
    return best


def rooms(lengths: np.ndarray, rows: np.ndarray, capacity: int) -> list[int]:
    return sorted((capacity - np.bincount(rows, weights=lengths)).astype(int).tolist())


@given(st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
@settings(deadline=None, max_examples=150)
def test_best_fit_decreasing_is_the_textbooks(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = best_fit(np.array(lengths, np.int64), capacity)
    assert rooms(np.array(lengths), rows, capacity) == plain_best_fit(lengths, capacity)
    assert set(rows.tolist()) == set(range(len(set(rows.tolist())))), "numbered from 0, none empty"


def test_best_fit_is_close_to_the_fewest_rows() -> None:
    """Theory bounds it by 11/9 of the fewest rows plus 6/9."""
    draw = np.random.default_rng(0)
    excess = 0
    for _ in range(60):
        lengths = draw.integers(1, 11, size=8)
        used, fewest = int(best_fit(lengths, 10).max()) + 1, fewest_rows(lengths.tolist(), 10)
        assert fewest <= used <= 11 / 9 * fewest + 6 / 9
        excess += used - fewest
    assert excess <= 2


@given(documents, st.integers(1, 17))
@settings(deadline=None, max_examples=150)
def test_every_target_is_trained_once(lengths: list[int], length: int) -> None:
    sizes = np.array(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    offsets, pieces, counts = pack_shard(starts, int(sizes.sum()), length)
    again = pack_shard(starts, int(sizes.sum()), length)
    assert np.array_equal(offsets, again[0])
    assert np.array_equal(pieces, again[1])
    inside = [range(start + 1, start + size) for start, size, _ in pieces.tolist()]
    begins = {int(start) for start, size in zip(starts, sizes) if size}
    assert Counter(itertools.chain(*inside)) == Counter(set(range(sizes.sum())) - begins), "all but documents' first"
    ends = {start + size for start, size in zip(starts.tolist(), lengths)}
    taken = Counter(token for start, size, _ in pieces.tolist() for token in range(start, start + size))
    assert set(taken) == set(range(sizes.sum()))
    for start, size, before in pieces.tolist():
        assert start - before in begins
        assert before == 0 or taken[start] == 2
        assert start + size in ends or size == length + 1, "no piece is shorter than it could be"
    used = np.add.reduceat(pieces["length"], offsets[:-1].astype(np.int64))
    assert used.max() <= length + 1
    assert counts.padding == int((length + 1 - used.astype(np.int64)).sum())
    assert (counts.rows, counts.pieces) == (len(offsets) - 1, len(pieces))
    assert counts.documents == len(begins)
    # The fewest that can be: what is longer than a row.
    assert counts.cut == sum(size > length + 1 for size in lengths)
    assert counts.pieces == sum(max(-(-(size - 1) // length), 1) for size in lengths if size)


def write_corpus(folder: Path, shards: list[list[int]], masks: bool = False, pad: int = 3) -> CorpusManifest:
    """Write a corpus of random documents of these lengths, with the same shards in both splits."""
    draw, splits = np.random.default_rng(5), {}
    for split in ("train", "valid"):
        records = []
        for number, lengths in enumerate(shards):
            prefix = folder / split / f"shard-{number:05d}"
            prefix.parent.mkdir(parents=True, exist_ok=True)
            with IndexedWriter(prefix, VOCABULARY) as writer:
                for size in lengths:
                    tokens = draw.integers(4, VOCABULARY, size)
                    tokens[-1] = EOS
                    counted = (draw.random(size) < 0.4) if masks else None
                    writer.add_document(tokens, mask=counted)
            kinds = ("bin", "idx", *["mask"] * masks)
            hashes = {f"{kind}_sha256": sha256_of(f"{prefix}.{kind}") for kind in kinds}
            records.append({"name": prefix.name, "tokens": sum(lengths), "documents": len(lengths), **hashes})
        splits[split] = {"tokens": sum(map(sum, shards)), "shards": records}
    document = {"vocab_size": VOCABULARY, "eos": EOS, "pad": pad, "dtype": "uint16", "splits": splits}
    return CorpusManifest(folder, {**document, "tokenizer": {"fingerprint": "none"}})


SHARDS = [[5, 40, 3, 17, 1, 2, 9], [33, 8, 8, 8, 100, 4], [12]]
LENGTH = 16


@pytest.fixture
def manifest(tmp_path: Path) -> CorpusManifest:
    return write_corpus(tmp_path / "corpus", SHARDS)


def open_packed(manifest: CorpusManifest, length: int = LENGTH, seed: int = 1, **options: object) -> PackedCorpus:
    corpus = open_corpus(manifest, "train", length, seed, DataConfig(pack="bestfit", **options))  # type: ignore[arg-type]
    assert isinstance(corpus, PackedCorpus)
    return corpus


@pytest.mark.parametrize("masks", [False, True])
def test_rows_hold_whole_documents(masks: bool, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, SHARDS, masks)
    make_plans(manifest, "train", LENGTH)
    corpus = open_packed(manifest, document_mask=True, document_positions=True)
    rows = corpus.read(np.arange(corpus.samples_per_epoch))
    shards = [corpus._shards[number] for number in range(len(corpus._shards))]
    texts = [shard[i] for shard in shards for i in range(len(shard))]
    counts = [shard.read_mask(0, shard.tokens) if masks else np.ones(shard.tokens, np.uint8) for shard in shards]
    counted_texts = np.split(np.concatenate(counts), np.cumsum([len(text) for text in texts]))
    whole = {tuple(text.tolist()): counted.astype(bool) for text, counted in zip(texts, counted_texts)}
    seen, targets = Counter[tuple[int, ...]](), 0
    assert rows.documents is not None
    assert rows.positions is not None
    assert rows.loss_mask is not None
    assert rows.padding is not None
    for row in range(len(rows)):
        numbers = rows.documents[row]
        filled = LENGTH + 1 - rows.padding[row]
        assert (rows.tokens[row, filled:] == 3).all()
        assert not rows.loss_mask[row, filled:].any()
        assert not rows.loss_mask[row, 0]
        assert (numbers[filled:] == int(numbers[filled - 1]) + 1).all(), "padding is a document of its own"
        for number in range(int(numbers[filled - 1]) + 1):
            columns = (numbers == number).nonzero().flatten()
            piece = rows.tokens[row, columns]
            assert torch.equal(rows.positions[row, columns], torch.arange(len(piece)))
            key = tuple(piece.tolist())
            mask = rows.loss_mask[row, columns]
            targets += int(mask.sum())
            if key in whole:  # a whole document: its first token counts where another document comes before it
                expected = torch.from_numpy(whole[key].copy())
                expected[0] &= bool(columns[0] > 0)
                assert torch.equal(mask, expected)
                seen[key] += 1
            else:
                assert not mask[0] or not int(columns[0])
    assert seen == Counter({key: 1 for key in whole if len(key) <= LENGTH + 1})
    first = int(rows.loss_mask[rows.positions == 0].sum())
    assert targets - first == sum(int(counted[1:].sum()) for counted in whole.values()), "every other target once"
    assert corpus.counts.padding == sum(rows.padding)
    unmasked = open_packed(manifest, loss="all").read(np.arange(corpus.samples_per_epoch)).loss_mask
    assert unmasked is not None
    assert bool((unmasked >= rows.loss_mask).all())
    assert torch.equal(unmasked, rows.loss_mask) == (not masks)


def test_epochs_visit_every_row_once_in_another_order(manifest: CorpusManifest) -> None:
    make_plans(manifest, "train", LENGTH)
    corpus = open_packed(manifest)
    n = corpus.samples_per_epoch
    epochs = corpus.locate(np.arange(3 * n)).reshape(3, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert not np.array_equal(epochs[0], open_packed(manifest, seed=2).locate(np.arange(n)))
    assert np.array_equal(corpus.locate([n + 3, 1, 2 * n, 0]), epochs.flatten()[[n + 3, 1, 2 * n, 0]])
    assert np.array_equal(corpus.locate_evenly(4), np.arange(4) * n // 4)
    few = open_corpus(manifest, "train", LENGTH, 1, DataConfig(pack="bestfit"))
    few._shards.max_open = 1
    assert torch.equal(few.read_samples(np.arange(n)).tokens, corpus.read_samples(np.arange(n)).tokens)
    assert len(few._open) == 1  # type: ignore[attr-defined]
    parts = []
    for rank in range(2):  # from the middle on, two ranks: together the rows of these samples
        loader = BatchLoader(corpus, BatchSchedule.constant(4), rank, 2, consumed_samples=4, total_samples=12)
        for batch in loader:
            rows = corpus.read_samples(batch.samples)
            assert torch.equal(batch.tokens, rows.tokens)
            assert rows.loss_mask is not None
            assert rows.padding is not None
            assert batch.loss_mask is not None
            assert torch.equal(batch.loss_mask, rows.loss_mask)
            assert batch.padding == rows.padding
            assert (batch.documents, batch.positions) == (None, None)
            parts += batch.samples
        loader.close()
    assert sorted(parts) == list(range(4, 12))


def test_without_a_padding_token_eos_pads(tmp_path: Path) -> None:
    for pad in (None, -1):
        manifest = write_corpus(tmp_path / str(pad), [[5], [20]], pad=pad)  # type: ignore[arg-type]
        assert make_plans(manifest, "train", 8) == PlanCounts(rows=4, pieces=4, padding=9, documents=2, cut=1)
        rows = open_packed(manifest, 8).read(np.arange(4))
        assert (rows.tokens[0, 5:] == EOS).all()


def test_plans_are_made_once_and_kept(manifest: CorpusManifest, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"shard-00000\.pack does not exist\. Make it again: rdt prep pack .* 16$"):
        open_packed(manifest)
    counts = make_plans(manifest, "train", LENGTH)
    files = sorted((manifest.directory / "packing").rglob("*"))
    assert [file.name for file in files if file.is_file()] == [f"shard-{n:05d}.pack" for n in range(3)]
    tokens = sum(map(sum, SHARDS)) + counts.pieces - counts.documents
    assert counts.padding == counts.rows * (LENGTH + 1) - tokens
    assert counts.describe(LENGTH) == (
        f"packed: {counts.rows} rows, {counts.padding / counts.rows / (LENGTH + 1):.2%} padding, 21.4% of documents cut"
    )
    with monkeypatch.context() as patch:
        patch.setattr(packing_module, "pack_shard", None)
        assert make_plans(manifest, "train", LENGTH) == counts
    missing = plan_path(manifest, "train", "shard-00001", LENGTH)
    content = missing.read_bytes()
    missing.unlink()
    assert make_plans(manifest, "train", LENGTH) == counts
    assert missing.read_bytes() == content


def test_a_plan_that_another_node_writes_meanwhile_is_used(
    manifest: CorpusManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, opened = make_plans(manifest, "train", LENGTH), PackingPlan.__init__
    path = plan_path(manifest, "train", "shard-00001", LENGTH)
    content = path.read_bytes()
    path.unlink()

    def appears_after_a_failed_look(plan: PackingPlan, *arguments: Any) -> None:
        try:
            opened(plan, *arguments)
        except DataError:
            path.write_bytes(content)
            raise

    monkeypatch.setattr(PackingPlan, "__init__", appears_after_a_failed_look)
    assert make_plans(manifest, "train", LENGTH) == counts


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "is not a packing plan": lambda path: path.write_bytes(b"RDT"),
    "has version 0 and sequence length 16, not 1 and 16": lambda path: flip(path, 8),
    "has version 1 and sequence length 17, not 1 and 16": lambda path: flip(path, 12),
    "was made for other shards than the manifest names now": lambda path: flip(path, 16),
    r"has \d+ bytes, its header says \d+": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "has other content than was written": lambda path: flip(path, -1),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_foreign_or_damaged_plan_is_refused_until_it_is_made_again(message: str, manifest: CorpusManifest) -> None:
    counts = make_plans(manifest, "train", LENGTH)
    path = plan_path(manifest, "train", "shard-00001", LENGTH)
    content = path.read_bytes()
    DAMAGE[message](path)
    damaged = path.read_bytes()
    with pytest.raises(DataError, match=rf"shard-00001\.pack {message}\. Make it again: rdt prep pack "):
        make_plans(manifest, "train", LENGTH)
    assert path.read_bytes() == damaged, "what a user may want to look at is not replaced unasked"
    assert make_plans(manifest, "train", LENGTH, replace_damaged=True) == counts
    assert path.read_bytes() == content


def test_shards_that_changed_make_a_plan_foreign(manifest: CorpusManifest) -> None:
    make_plans(manifest, "train", LENGTH)
    manifest.document["splits"]["train"]["shards"][2]["idx_sha256"] = "00" * 32
    with pytest.raises(DataError, match="was made for other shards"):
        open_packed(manifest)
    with pytest.raises(DataError, match=r"shard-00002.idx has other content than was written"):
        make_plans(manifest, "train", LENGTH, replace_damaged=True)


def test_an_impossible_row_is_an_error_not_a_wrong_sample(manifest: CorpusManifest) -> None:
    counts = make_plans(manifest, "train", LENGTH)
    path = plan_path(manifest, "train", "shard-00002", LENGTH)
    content = path.read_bytes()
    for field, value in ((0, 10**6), (8, 0), (8, LENGTH + 2)):
        damaged = bytearray(content)
        first = len(content) - PIECE.itemsize
        damaged[first + field : first + field + 4] = value.to_bytes(4, "little")
        path.write_bytes(damaged)
        corpus = open_packed(manifest)
        with pytest.raises(DataError, match=r"shard-00002\.pack holds an impossible row 0"):
            corpus.read(np.array([counts.rows - 1]))
        corpus.close()
    path.write_bytes(content)
    corpus = open_packed(manifest)
    os.truncate(path, HEADER.size)
    with pytest.raises(DataError, match="ends early: it changed while in use"):
        corpus.read(np.array([counts.rows - 1]))


def test_killed_while_making_a_plan(tmp_path: Path) -> None:
    """The process dies with half a plan under its temporary name; the next one makes all of it."""
    manifest = write_corpus(tmp_path, SHARDS)
    program = (
        "import json, os, pathlib, signal, sys\n"
        "from megatron_rdt.data import packing_plan as packing\n"
        "from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest\n"
        "made, write = [], packing.atomic_open\n"
        "class Half:\n"
        "    def __init__(self, *arguments): self.context = write(*arguments)\n"
        "    def __enter__(self):\n"
        "        self.file = self.context.__enter__(); made.append(1); return self\n"
        "    def __exit__(self, *error): return self.context.__exit__(*error)\n"
        "    def write(self, content):\n"
        "        if len(made) == 2 and len(content) < 300:\n"
        "            self.file.write(content[:50]); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "        self.file.write(content)\n"
        "packing.atomic_open = Half\n"
        "document = json.loads(sys.stdin.read())\n"
        "packing.make_plans(CorpusManifest(pathlib.Path(sys.argv[1]), document), 'train', 16)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], input=json.dumps(manifest.document), text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "packing" / "L16" / "train"
    left = sorted(file.name for file in folder.iterdir())
    assert left[:2] == [".lock", "shard-00000.pack"]
    assert left[2].startswith("shard-00001.pack.")
    assert len(left) == 3
    counts = make_plans(manifest, "train", 16)
    assert sorted(file.name for file in folder.iterdir()) == [f"shard-{n:05d}.pack" for n in range(3)]
    other = write_corpus(tmp_path / "other", SHARDS)
    assert make_plans(other, "train", 16) == counts
    for name in (file.name for file in folder.iterdir()):
        assert (folder / name).read_bytes() == (other.directory / "packing" / "L16" / "train" / name).read_bytes()


def test_where_the_corpus_cannot_be_written_the_way_out_is_said(manifest: CorpusManifest) -> None:
    (manifest.directory / "packing").write_text("in the way")
    with pytest.raises(DataError, match=r"could not be made \(Not a directory\).*rdt prep pack .* --data\.pack chunk"):
        make_plans(manifest, "train", LENGTH)
