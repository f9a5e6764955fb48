"""Prep that is killed or interrupted, and is started again with the same or other options and files."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from data_prep import pipeline
from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import Job, installed_versions, working_directory_path
from data_prep.pipeline import prepare
from data_prep.sources.inputs import Part
from data_prep.stages import publish
from data_prep.stages.tokenizer import make_tokenizer
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.killed_preps import config, kill_when
from tests.data_prep.small_corpora import read_files

STAGES = ["plan.json", "scan/part-00003.json", "duplicates.json", "tokenizer.json", "encode/part-00000-00.json"]
STAGES += ["groups/group-00000.json", "groups/group-00002.json"]


def test_the_corpus_is_in_several_groups(undisturbed: Path) -> None:
    manifest = load_manifest(undisturbed)
    names = [shard["name"] for shard in manifest.document["splits"]["train"]["shards"]]
    assert len({name[:11] for name in names}) > 3
    assert manifest.document["dropped"] == {"duplicate": 20}
    assert manifest.document["inputs"][0]["path"] == "a.jsonl"
    manifest.verify("full")


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_killed_at_every_stage(source: Path, undisturbed: Path, tmp_path: Path, repository: Path) -> None:
    """One prep after another is killed a stage later; the last one finishes."""
    options = config(source, tmp_path / "out")
    killed = 0
    for stage in STAGES:
        killed += kill_when(options, stage, repository)
        if working_directory_path(tmp_path / "out").exists():
            assert not (tmp_path / "out").exists()
    assert killed >= 4, "a machine so slow that most of them ended first"
    prepare(options)
    assert read_files(tmp_path / "out") == read_files(undisturbed)
    assert os.listdir(tmp_path) == ["out"]


def interrupt_before(monkeypatch: pytest.MonkeyPatch, module: object, name: str, calls: int = 0) -> None:
    """Make a function raise KeyboardInterrupt after a number of calls."""
    function, count = getattr(module, name), Counter[str]()

    def call_or_interrupt(*arguments: object) -> object:
        count[name] += 1
        if count[name] > calls:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(module, name, call_or_interrupt)


def prepare_interrupted(options: PrepConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(options)


def record_parts(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Record the indices of the parts that a function of the pipeline is called for; return the growing list."""
    function, seen = getattr(pipeline, name), list[int]()

    def call_and_record(job: Job, part: Part, *rest: object) -> None:
        seen.append(part.index)
        function(job, part, *rest)

    monkeypatch.setattr(pipeline, name, call_and_record)
    return seen


def test_what_is_done_is_not_done_again(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_before(patch, pipeline, "scan_part", 3)
        prepare_interrupted(config(source, tmp_path / "out"))
    with monkeypatch.context() as patch:
        interrupt_before(patch, pipeline, "encode_slice", 4)
        scanned = record_parts(patch, "scan_part")
        prepare_interrupted(config(source, tmp_path / "out"))
    encoded = record_parts(monkeypatch, "encode_slice")
    prepare(config(source, tmp_path / "out"))
    assert scanned == [3, 4, 5, 6, 7]
    assert encoded == [4, 5, 6, 7]
    assert read_files(tmp_path / "out") == read_files(undisturbed)


def test_a_damaged_step_is_done_again(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose size differs from its record, and a temporary file of a dead process."""
    with monkeypatch.context() as patch:
        interrupt_before(patch, publish, "publish_corpus")
        prepare_interrupted(config(source, tmp_path / "out"))
    root = working_directory_path(tmp_path / "out")
    assert (root / "corpus" / "manifest.json").exists()
    shard = root / "corpus" / "train" / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    (root / "corpus" / "train" / "shard-00000.bin.77.tmp").write_bytes(b"x")
    prepare(config(source, tmp_path / "out"))
    assert read_files(tmp_path / "out") == read_files(undisturbed)


def test_a_tokenizer_without_its_record_is_made_again(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated one, as after a power failure, and one of a prep with other options that was killed before the record."""
    out = tmp_path / "out"
    begin_prep(source, out, monkeypatch)
    model = working_directory_path(out) / "corpus" / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-100])
    prepare(config(source, out))
    assert read_files(out) == read_files(undisturbed)
    with monkeypatch.context() as patch:
        interrupt_before(patch, make_tokenizer, "tokenizer_record_path", 0)
        prepare_interrupted(config(source, tmp_path / "late", vocab_size=340))
    late = working_directory_path(tmp_path / "late") / "corpus" / "tokenizer"
    assert late.is_dir()
    prepare(config(source, tmp_path / "late"))
    assert load_manifest(tmp_path / "late").fingerprint == load_manifest(undisturbed).fingerprint


def test_killed_after_the_corpus_was_published(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The working directory, which may hold copies of datasets, is removed by the next prep."""
    with monkeypatch.context() as patch:
        interrupt_before(patch, publish, "fsync_directory", 0)
        prepare_interrupted(config(source, tmp_path / "out"))
    assert working_directory_path(tmp_path / "out").exists()
    prepare(config(source, tmp_path / "out"))
    assert "nothing to do" in capsys.readouterr().out
    assert read_files(tmp_path / "out") == read_files(undisturbed)
    assert os.listdir(tmp_path) == ["out"]


def begin_prep(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Run a prep that is interrupted while it encodes."""
    with monkeypatch.context() as patch:
        interrupt_before(patch, pipeline, "encode_slice", 2)
        prepare_interrupted(config(source, out, **changes))


def test_other_options_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    begin_prep(source, out, monkeypatch)
    for changes, message in (
        ({"seed": 8}, "begun with seed=7, now 8"),
        ({"vocab_size": 340, "dedup": "none"}, "begun with dedup=exact, now none; vocab_size=330, now 340"),
    ):
        with pytest.raises(ConfigError, match=rf"unfinished `rdt prep` that was {message}.*--restart"):
            prepare(config(source, out, **changes))
    monkeypatch.setattr(
        "data_prep.jobs.working_directory.installed_versions", lambda: installed_versions() | {"sentencepiece": "0.0.1"}
    )
    with pytest.raises(ConfigError, match=r"sentencepiece 0\..*, now 0\.0\.1"):
        prepare(config(source, out))
    monkeypatch.undo()
    other = prepare(config(source, tmp_path / "other", seed=8))
    assert read_files(prepare(config(source, out, seed=8, restart=True))).keys() == read_files(other).keys()
    assert load_manifest(out).fingerprint == load_manifest(other).fingerprint


def test_policies_and_the_number_of_workers_may_change(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_prep(source, tmp_path / "out", monkeypatch)
    prepare(config(source, tmp_path / "out", on_bad="skip", max_bad=0.5))
    assert load_manifest(tmp_path / "out").fingerprint == load_manifest(undisturbed).fingerprint


def test_changed_files_begin_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "a.jsonl"
    copy.write_bytes(source.read_bytes())
    begin_prep(copy, tmp_path / "out", monkeypatch)
    with open(copy, "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    prepare(config(copy, tmp_path / "out"))
    assert "a.jsonl has changed: beginning again" in capsys.readouterr().out
    assert read_files(tmp_path / "out") == read_files(prepare(config(copy, tmp_path / "other")))


def test_files_that_change_under_it_are_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "a.jsonl"
    copy.write_bytes(source.read_bytes())
    encode = pipeline.encode_slice

    def change_then_encode(*arguments: object) -> None:
        copy.write_bytes(source.read_bytes().replace(b"loop", b"LOOP"))
        encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "encode_slice", change_then_encode)
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was prepared"):
        prepare(config(copy, tmp_path / "out"))


def test_a_full_disk_is_foreseen(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = publish.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"has 0\.00 GB free, and about 0\.00 GB are needed for 0\.00 GB of text"):
        prepare(config(source, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_done(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_group", raise_disk_full)
        with pytest.raises(DataError, match=r"disk is full \(.* free\) while writing .* continues where it stopped"):
            prepare(config(source, tmp_path / "out"))
    assert read_files(prepare(config(source, tmp_path / "out"))) == read_files(undisturbed)


def test_a_disk_too_full_for_links(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_files(prepare(config(source, tmp_path / "straight", dedup="near")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", raise_disk_full)
        with pytest.raises(DataError, match=r"disk is full \(.* free\) while writing .* continues where it stopped"):
            prepare(config(source, tmp_path / "out", dedup="near"))
    assert read_files(prepare(config(source, tmp_path / "out", dedup="near"))) == expected


def raise_disk_full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")
