"""Folders of sources: links are followed, every file is read once, and nothing is skipped without a word."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources import folder_walk
from data_prep.sources.inputs import SourceListing, list_sources
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_split_texts, read_texts


def list_folder(*sources: Path, **changes: object) -> SourceListing:
    """List the files of folders."""
    return list_sources(PrepConfig(sources=list(map(str, sources)), **changes))  # type: ignore[arg-type]


def names(listing: SourceListing) -> list[str]:
    return [file.name for file in listing.files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three text files, one of them in a folder below."""
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "z.txt"):
        (folder / name).write_text(f"text of {name}")
    return folder


def test_linked_folders_and_files_are_read(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "below").mkdir(parents=True)
    for path in (other / "c.txt", other / "below" / "d.txt", tmp_path / "e.txt"):
        path.write_text(path.name)
    (folder / "link").symlink_to("../other")
    (folder / "deep" / "e.txt").symlink_to(tmp_path / "e.txt")
    expected = [
        "text/a.txt",
        "text/deep/b.txt",
        "text/deep/e.txt",
        "text/link/below/d.txt",
        "text/link/c.txt",
        "text/z.txt",
    ]
    assert names(list_folder(folder)) == expected


def test_half_of_the_documents_behind_a_link(tmp_path: Path) -> None:
    for i, line in enumerate(RECORDS):
        path = tmp_path / ("text" if i % 2 else "elsewhere") / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.loads(line)["text"])
    (tmp_path / "text" / "more").symlink_to(tmp_path / "elsewhere")
    out = prepare(make_config(tmp_path / "text", tmp_path / "out"))
    assert read_texts(out) == {json.loads(line)["text"] for line in RECORDS}


def test_a_loop_of_links_ends(folder: Path) -> None:
    before = names(list_folder(folder))
    (folder / "deep" / "loop").symlink_to("..")
    (folder / "deep" / "self").symlink_to(".")
    (folder / "0-parent").symlink_to(folder.parent)
    listing = list_folder(folder)
    assert names(listing) == before
    assert listing.reached_again.count == 3
    assert set(listing.reached_again.first) == {"text/0-parent/text/", "text/deep/loop/", "text/deep/self/"}


def test_a_file_that_several_paths_lead_to_is_read_once(folder: Path) -> None:
    (folder / "0.txt").symlink_to("z.txt")
    (folder / "1").symlink_to("deep")
    listing = list_folder(folder, folder / "deep")
    assert names(listing) == ["text/a.txt", "text/deep/b.txt", "text/z.txt"]
    assert (listing.reached_again.count, listing.reached_again.first) == (3, ["text/1/", "text/0.txt", "deep/b.txt"])
    held_out = list_folder(folder, valid_sources=[str(folder / "deep")])
    assert [(file.name, file.valid) for file in held_out.files] == [
        ("text/a.txt", False),
        ("text/z.txt", False),
        ("deep/b.txt", True),
    ]


def test_copies_are_other_files(folder: Path) -> None:
    shutil.copy2(folder / "a.txt", folder / "copy.txt")
    assert "text/copy.txt" in names(list_folder(folder))


def test_hidden_files_are_read_and_others_are_counted_by_ending(folder: Path, tmp_path: Path) -> None:
    (folder / ".git").mkdir()
    for name in (
        ".git/HEAD",
        ".git/notes.txt",
        ".hidden.md",
        "a.bz2",
        "b.BZ2",
        "c.json.gz",
        "deep/d.bz2",
        "e.bz2",
        "log.17",
    ):
        (folder / name).write_text("x")
    listing = list_folder(folder)
    assert {"text/.git/notes.txt", "text/.hidden.md"} < set(names(listing))
    assert listing.as_json()["passed_over"] == {
        ".bz2": {"count": 4, "first": ["text/a.bz2", "text/b.BZ2", "text/deep/d.bz2"]},
        ".json.gz": {"count": 1, "first": ["text/c.json.gz"]},
        "no ending": {"count": 2, "first": ["text/.git/HEAD", "text/log.17"]},
    }


def test_the_summary_and_the_manifest_say_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i, line in enumerate(RECORDS):
        (folder / f"{i}.txt").write_text(json.loads(line)["text"])
    (folder / "more.jsonl.bz2").write_bytes(b"")
    (folder / "again.txt").symlink_to("0.txt")
    manifest = load_manifest(prepare(make_config(folder, tmp_path / "out"))).document
    assert manifest["passed_over"] == {".bz2": {"count": 1, "first": ["text/more.jsonl.bz2"]}}
    assert manifest["reached_again"] == {"count": 1, "first": ["text/again.txt"]}
    printed = capsys.readouterr().out
    for line in ("not read: 1 .bz2 (text/more.jsonl.bz2)", "read once, though reached again: 1 (text/again.txt)"):
        assert printed.count(line) == 2, "before the work and after it"


def test_a_source_without_a_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    """As one that is not mounted; the other sources do not hide it."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file with an ending of .* in .*empty \(there: no file\)"):
        list_folder(folder, tmp_path / "empty")
    (tmp_path / "empty" / "a.json.gz").write_text("")
    with pytest.raises(DataError, match=r"in .*empty \(there: 1 \.json\.gz\)\. Set --sources or --extensions"):
        list_folder(folder, valid_sources=[str(tmp_path / "empty")])
    with pytest.raises(DataError, match=r"that is not in .* too"):
        list_folder(folder / "deep", valid_sources=[str(folder)])


def test_a_folder_that_cannot_be_read_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_walk.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"text/deep cannot be read: Permission denied\. Make it readable"):
        list_folder(folder)


def test_a_file_that_cannot_be_read_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folder_walk.os, "access", lambda path, mode: Path(path).name != "b.txt")
    list_folder(folder)  # opening it succeeds
    monkeypatch.setattr(folder_walk, "open", refuse, raising=False)
    with pytest.raises(DataError, match=r"text/deep/b\.txt cannot be read: Permission denied"):
        list_folder(folder)


@pytest.mark.parametrize("target", ["../gone.txt", "link", "../text/a.txt/x"])
def test_a_broken_link_is_an_error_or_counted(target: str, folder: Path) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(DataError, match=rf"text/link is a link to {target}, which does not exist\. .* --on_bad skip"):
        list_folder(folder)
    listing = list_folder(folder, on_bad="skip")
    assert len(listing.files) == 3
    assert listing.as_json()["passed_over"] == {"broken link": {"count": 1, "first": ["text/link"]}}


def test_a_pipe_is_no_file(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert list_folder(folder).as_json()["passed_over"] == {"no ending": {"count": 1, "first": ["text/pipe"]}}
    with pytest.raises(ConfigError, match=r"pipe is neither a file nor a folder\. Text is read twice"):
        list_folder(folder / "pipe")
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is a pipe, not a file"):
        list_folder(folder)


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are prepared like others; the manifest keeps them, and what is printed has their bytes escaped."""
    folder = tmp_path / "text"
    (folder / os.fsdecode(b"caf\xe9")).mkdir(parents=True)
    for i, line in enumerate(RECORDS):
        (folder / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff%d.txt" % i)).write_text(json.loads(line)["text"])
    (folder / os.fsdecode(b"\xe9.bz2")).write_text("")
    out = prepare(make_config(folder, tmp_path / "out"))
    assert read_texts(out) == {json.loads(line)["text"] for line in RECORDS}
    manifest = load_manifest(out).document
    assert os.fsencode(manifest["inputs"][0]["path"]) == b"text/caf\xe9/\xff0.txt"
    assert "not read: 1 .bz2 (text/\\xe9.bz2)" in capsys.readouterr().out
    assert "nothing to do" not in capsys.readouterr().out
    prepare(make_config(folder, tmp_path / "out"))
    assert "nothing to do" in capsys.readouterr().out
    changed = folder / os.fsdecode(b"caf\xe9/\xff3.txt")
    changed.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"text/caf\\xe9/\\xff3\.txt has changed"):
        prepare(make_config(folder, tmp_path / "out"))
    with pytest.raises(DataError, match=r"caf\\xe9/\\xff3\.txt:1: invalid UTF-8 byte 0xff"):
        prepare(make_config(folder, tmp_path / "out", restart=True))
    out = prepare(make_config(folder, tmp_path / "out", restart=True, on_bad="replace"))
    assert "\ufffd" in read_texts(out)
    assert str(load_manifest(out).document["bad"]).count("\\\\xff3.txt:1") == 1
    config = dataclasses.replace(
        make_config(folder, tmp_path / "out2"), valid_sources=[str(folder / os.fsdecode(b"caf\xe9"))]
    )
    with pytest.raises(DataError, match="that is not in"):
        prepare(config)
    assert read_split_texts(out, "valid")


def test_hard_links_are_read_once(folder: Path) -> None:
    """Like links: as validation if one name says so, and only where device and number are shared."""
    os.link(folder / "a.txt", folder / "again.txt")
    os.link(folder / "deep" / "b.txt", folder / "deep" / "b2.txt")
    listing = list_folder(folder)
    assert names(listing) == ["text/a.txt", "text/deep/b.txt", "text/z.txt"]
    assert listing.as_json()["reached_again"] == {"count": 2, "first": ["text/again.txt", "text/deep/b2.txt"]}
    held_out = list_folder(folder, valid_sources=[str(folder / "again.txt")])
    assert {file.name: file.valid for file in held_out.files}["again.txt"]
    assert "text/a.txt" not in names(held_out)
    with pytest.raises(ConfigError, match=r"a\.txt, the same as .*again\.txt, is given twice in sources"):
        prepare(PrepConfig(sources=[str(folder / "a.txt"), str(folder / "again.txt")], out=str(folder.parent / "out")))


def test_what_prep_wrote_is_no_text(folder: Path) -> None:
    """The corpus of this prep, an earlier one and their working directories, in the folder of the text."""
    (folder / "z.txt").write_text("\n".join(RECORDS))
    extensions = [".txt", ".json=text"]
    first = prepare(
        make_config(folder, folder / "deep" / "first", vocab_size=300, extensions=extensions, valid_fraction=0)
    )
    (folder / ".second.prep" / "scan").mkdir(parents=True)  # left by a prep that was killed
    (folder / ".second.prep" / "plan.json").write_text("{}")
    (folder / ".out.prep").mkdir()  # of this one
    (folder / ".out.prep" / "x.txt").write_text("not text")
    (folder / ".out.lock").touch()
    (folder / ".notes.prep").mkdir()  # not of prep
    (folder / ".notes.prep" / "c.txt").write_text("text")
    listing = list_folder(folder, out=str(folder / "out"), extensions=extensions)
    assert names(listing) == ["text/.notes.prep/c.txt", "text/a.txt", "text/deep/b.txt", "text/z.txt"]
    written = ["text/.second.prep/", "text/deep/first/", "text/out/"]
    assert listing.as_json()["passed_over"] == {"output of rdt prep": {"count": 3, "first": written}}
    assert load_manifest(first).document["passed_over"] == {
        "output of rdt prep": {"count": 1, "first": ["text/deep/first/"]}
    }
    again = make_config(folder, folder / "deep" / "first", vocab_size=300, extensions=extensions, valid_fraction=0)
    (folder / ".notes.prep" / "c.txt").unlink()
    shutil.rmtree(folder / ".out.prep")
    assert prepare(again) == first  # the folder has not changed since


def test_the_output_may_not_lie_in_the_folder_of_a_dataset(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"out .*text/out is in the folder of hf:.*text, .* Set --out"):
        list_sources(PrepConfig(sources=[f"hf:{folder}"], out=str(folder / "out")))


def test_a_pattern_is_not_expanded(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"source .*\*\.txt does not exist\. Patterns are not expanded\. Name a file"):
        list_folder(folder / "*.txt")
