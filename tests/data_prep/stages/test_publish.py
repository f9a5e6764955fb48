"""The corpus takes its name in the end: what cannot be replaced is refused first, and nothing good is lost on the way."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest

from data_prep import pipeline
from data_prep.jobs.working_directory import working_directory_path
from data_prep.pipeline import prepare
from data_prep.stages import publish
from launch.cli import run_command
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_files, write_lines


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", list(RECORDS))


def refuse_to_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "scan_part", lambda *_: pytest.fail("began to work"))


def test_a_mount_point_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with monkeypatch.context() as patch:
        refuse_to_scan(patch)
        for options in ({}, {"restart": True}):
            with pytest.raises(ConfigError, match=r"disk is a mount point.* Name a directory below it"):
                prepare(make_config(source, tmp_path / "disk", **options))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk"]
    below = prepare(make_config(source, tmp_path / "disk" / "corpus"))
    # A complete corpus that is mounted where it is wanted is no fault: there is nothing to do.
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "corpus")
    assert prepare(make_config(source, below)) == below


def test_a_link_stays_and_the_corpus_is_where_it_leads(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "corpus").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/corpus")
    for seed in (7, 8):  # into an empty directory, and over a corpus
        assert prepare(make_config(source, tmp_path / "link", seed=seed, restart=True)) == disk / "corpus"
        assert os.readlink(tmp_path / "link") == "disk/corpus"
        assert load_manifest(disk / "corpus").document["prep"]["options"]["seed"] == seed
        assert os.listdir(disk) == ["corpus"]
    (tmp_path / "unmounted").symlink_to("absent/corpus")
    with pytest.raises(ConfigError, match=r"unmounted is a link to .*absent/corpus, which does not exist"):
        prepare(make_config(source, tmp_path / "unmounted"))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk", "link", "unmounted"]


def test_a_working_directory_elsewhere_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus could not be renamed out of it."""
    refuse_to_scan(monkeypatch)
    (tmp_path / "scratch").mkdir()
    (tmp_path / ".out.prep").symlink_to("scratch")
    with pytest.raises(ConfigError, match=r"\.out\.prep, where the corpus is put together, is a link or a mount point"):
        prepare(make_config(source, tmp_path / "out"))


def test_a_rename_that_fails_in_the_end_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(make_config(source, tmp_path / "out"))
    before, rename = read_files(out), Path.rename
    options = make_config(source, out, seed=8, restart=True)

    def refuse_the_new_corpus(path: Path, target: Path) -> Path:
        if path.name == "corpus":
            raise OSError(18, "Invalid cross-device link")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_the_new_corpus)
        with pytest.raises(
            DataError, match=r"complete in .*\.out\.prep/corpus, but cannot be renamed .*cross-device link"
        ):
            prepare(options)
    assert read_files(out) == before
    refuse_to_scan(monkeypatch)
    monkeypatch.setattr(pipeline, "encode_slice", lambda *_: pytest.fail("encoded again"))
    prepare(options)
    assert load_manifest(out).document["prep"]["options"]["seed"] == 8
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_an_old_corpus_that_cannot_be_deleted_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rmtree = prepare(make_config(source, tmp_path / "out")), shutil.rmtree

    def refuse_the_old_corpus(path: Path, ignore_errors: bool = False) -> None:
        if (Path(path) / "manifest.json").exists():
            if ignore_errors:
                return
            raise PermissionError(13, "Permission denied")
        rmtree(path, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse_the_old_corpus)
        prepare(make_config(source, out, seed=8, restart=True))
        assert re.search(r"\.out\.deleted cannot be deleted: Permission denied\. Delete it\.", capsys.readouterr().out)
        prepare(make_config(source, out, seed=8))  # which does nothing, as it should
        refuse_to_scan(patch)
        with pytest.raises(ConfigError, match=r"\.out\.deleted is left from a corpus that was replaced"):
            prepare(make_config(source, out, seed=9, restart=True))
    assert load_manifest(out).document["prep"]["options"]["seed"] == 8


@pytest.mark.parametrize("content", ["nothing", "an empty directory", "notes"])
def test_an_old_corpus_is_deleted_only_for_a_new_one(content: str, source: Path, tmp_path: Path) -> None:
    """Killed between the two renames; meanwhile, somebody may have made something of the name."""
    out = prepare(make_config(source, tmp_path / "out"))
    before = read_files(out)
    replaced = out.rename(tmp_path / ".out.replaced")
    if content != "nothing":
        out.mkdir()
    if content == "notes":
        (out / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"\.out\.replaced is the corpus that .* is something else\. Move one"):
            prepare(make_config(source, out))
        assert (out / "notes.txt").read_text() == "mine"
        assert read_files(replaced) == before
        return
    prepare(make_config(source, out))
    assert read_files(out) == before
    assert not replaced.exists()


def test_a_corpus_that_was_half_deleted_is_not_taken_back(source: Path, tmp_path: Path) -> None:
    out = prepare(make_config(source, tmp_path / "out"))
    before = read_files(out)
    (tmp_path / ".out.deleted" / "train").mkdir(parents=True)
    shutil.rmtree(out)
    prepare(make_config(source, out))
    assert read_files(out) == before
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


@pytest.mark.parametrize("name", ["train/notes.txt", "tokenizer/README.md", "valid/shard-00000.bin.bak", "mine/a.txt"])
def test_restart_deletes_no_foreign_file_at_any_depth(name: str, source: Path, tmp_path: Path) -> None:
    out = prepare(make_config(source, tmp_path / "out"))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds {name}, which `rdt prep` did not write"):
        prepare(make_config(source, out, seed=8, restart=True))
    (out / name).unlink()
    prepare(make_config(source, out, seed=8, restart=True))


def test_restart_deletes_everything_that_prep_and_pack_write(source: Path, tmp_path: Path) -> None:
    out = prepare(make_config(source, tmp_path / "out", shard_bytes=400))
    assert run_command(["prep", "pack", str(out), "--sequence_length", "16"]) == 0
    prepare(make_config(source, out, seed=8, restart=True))


def break_off(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Leave an unfinished prep in which everything is done but the manifest; return its files."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_config(source, out))
    return read_files(working_directory_path(out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ["absent.jsonl"]}, "absent.jsonl does not exist"),
        ({"sources": ["hf:absent"]}, "absent"),
        ({"tokenizer": "absent"}, "absent does not exist"),
        ({"special_tokens": ["<s>"]}, "special_tokens names '<s>'"),
        ({"filters": ["absent:function"]}, "absent"),
    ],
)
def test_restart_keeps_the_unfinished_prep_until_it_can_begin(
    changes: dict, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    before = break_off(source, out, monkeypatch)
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(make_config(source, out, seed=8, restart=True, **changes))
    assert read_files(working_directory_path(out)) == before


def test_restart_on_a_full_disk_keeps_the_unfinished_prep(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = break_off(source, out, monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage._replace(free=-(10**9)))
    with pytest.raises(DataError, match="Free space, or set --out to another disk"):
        prepare(make_config(source, out, seed=8, restart=True))
    assert read_files(working_directory_path(out)) == before


def test_other_options_leave_an_unfinished_prep_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little is done: the refusal says the same when it is asked again."""
    out = tmp_path / "out"
    break_off(source, out, monkeypatch)
    root = working_directory_path(out)
    for path in [path for path in root.iterdir() if path.name != "plan.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = read_files(working_directory_path(out))
    assert list(before) == ["plan.json"]
    for _ in range(2):
        with pytest.raises(ConfigError, match="begun with seed=7, now 8"):
            prepare(make_config(source, out, seed=8))
    assert read_files(working_directory_path(out)) == before


def test_a_damaged_description_is_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = working_directory_path(tmp_path / "out")
    root.mkdir()
    (root / "plan.json").write_text('{"options": ')
    prepare(make_config(source, tmp_path / "out"))
    assert (
        f"{root}/plan.json is damaged, so what {root} holds cannot be used: beginning again" in capsys.readouterr().out
    )


def test_a_description_that_cannot_be_read_is_not_overwritten(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read_text = break_off(source, tmp_path / "out", monkeypatch), Path.read_text

    def refuse_plan(path: Path, *arguments: str, **named: str) -> str:
        if path.name == "plan.json":
            raise OSError(5, "Input/output error")
        return read_text(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse_plan)
        with pytest.raises(
            DataError, match=r"plan\.json cannot be read: Input/output error\. Make it readable, or remove"
        ):
            prepare(make_config(source, tmp_path / "out"))
    assert read_files(working_directory_path(tmp_path / "out")) == before


KEPT = r" What is done is kept in .*\.out\.prep: the same command continues there, or begins again if the text has changed\."


def test_a_refusal_says_what_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command that the refusal asks for continues from there."""
    too_large = make_config(source, tmp_path / "out", vocab_size=30000)
    with pytest.raises(DataError, match=rf"vocab_size 30000 is too large .*add text\.{KEPT}$"):
        prepare(too_large)
    refuse_to_scan(monkeypatch)
    prepare(make_config(source, tmp_path / "out", vocab_size=310))


def test_a_refusal_that_keeps_nothing_does_not_say_so(source: Path, tmp_path: Path) -> None:
    write_lines(source, ["{", *RECORDS])
    with pytest.raises(DataError, match=r"a\.jsonl:1 .*not valid JSON") as caught:
        prepare(make_config(source, tmp_path / "out"))
    assert not re.search(KEPT, str(caught.value))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_home_is_expanded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    out = prepare(dataclasses.replace(make_config(source, Path("x")), out="~/corpus"))
    assert out == tmp_path / "corpus"
    assert load_manifest(out).document["splits"]["train"]["documents"] > 0
