"""Prep with inputs and outputs that change or are damaged: changed files, two preps at once, a kill while publishing."""

import dataclasses
import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from data_prep import pipeline
from data_prep.pipeline import prepare
from data_prep.sources.records import BAD_LISTED
from data_prep.stages.write_shards import group_parts
from megatron_rdt import locks
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import ConfigError, DataError, LaunchError, LockLostError
from megatron_rdt.locks import hold_lock
from tests.data_prep.small_corpora import RECORDS, make_config, read_files, read_texts, write_lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of sixty text files."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, line in enumerate(RECORDS):
        (folder / f"{i:02d}.txt").write_text(json.loads(line)["text"])
    return folder


def change_file(folder: Path) -> None:
    (folder / "03.txt").write_text("something else")


def change_file_keeping_its_size(folder: Path) -> None:
    file = folder / "03.txt"
    file.write_text(file.read_text().swapcase())


def add_file(folder: Path) -> None:
    (folder / "new.txt").write_text("one more")


def remove_file(folder: Path) -> None:
    (folder / "03.txt").unlink()


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (change_file, r"text/03\.txt has changed"),
        (change_file_keeping_its_size, r"text/03\.txt has changed"),
        (add_file, r"text/new\.txt was added"),
        (remove_file, r"text/03\.txt was removed"),
    ],
)
def test_changed_text_is_noticed(do: object, message: str, folder: Path, tmp_path: Path) -> None:
    out = prepare(make_config(folder, tmp_path / "out"))
    before = read_files(out)
    do(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(folder, out))
    assert read_files(out) == before
    prepare(make_config(folder, out, restart=True))
    assert read_files(out) != before


def test_touched_text_is_not_changed_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(make_config(folder, tmp_path / "out"))
    os.utime(folder / "03.txt", (1, 1))
    prepare(make_config(folder, out))
    assert "nothing to do" in capsys.readouterr().out


def test_one_prep_at_a_time(folder: Path, tmp_path: Path) -> None:
    with hold_lock(tmp_path / ".out.lock", "held"), pytest.raises(LaunchError, match="another `rdt prep` is writing"):
        prepare(make_config(folder, tmp_path / "out"))
    prepare(make_config(folder, tmp_path / "out"))
    assert not (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("error", [None, FileNotFoundError("what the other one has removed")])
def test_a_prep_whose_lock_was_taken_over_ends(
    error: Exception | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that was stopped for so long that it seemed dead: it leaves everything to the other one."""
    lock, other = tmp_path / ".out.lock", {"pid": 1, "user": "me", "host": "other", "since": time.time()}
    left: dict[str, bytes] = {}

    def lose_lock(*arguments: object) -> object:
        lock.write_text(json.dumps(other))
        away_s = locks.STALE_S
        monkeypatch.setattr(locks, "_read_clock", lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + away_s)
        left.update(read_files(tmp_path))
        if error is not None:
            raise error
        return group_parts(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "group_parts", lose_lock)
    with pytest.raises(
        LockLostError, match=r"taken over the lock .*\.out\.lock, .* process 1 of me on other, for \d+ sec"
    ):
        prepare(make_config(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert read_files(tmp_path) == left
    assert json.loads(lock.read_text()) == other


def test_killed_while_replacing(folder: Path, tmp_path: Path) -> None:
    """The old corpus was renamed and the new one not yet: the old one is taken back."""
    out = prepare(make_config(folder, tmp_path / "out"))
    before = read_files(out)
    out.rename(tmp_path / ".out.replaced")
    prepare(make_config(folder, out))
    assert read_files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]


def test_restart_deletes_no_foreign_file(folder: Path, tmp_path: Path) -> None:
    out = prepare(make_config(folder, tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt, which `rdt prep` did not write"):
        prepare(make_config(folder, out, seed=8, restart=True))
    assert (out / "notes.txt").read_text() == "mine"


def test_workers_that_cannot_start_are_not_called_killed(tmp_path: Path) -> None:
    """As in a script that calls `prepare` without a guard: every worker would run the script again."""
    script = "from data_prep.pipeline import prepare\nfrom tests.data_prep.small_corpora import *\n"
    script += f"write_lines(p := Path({str(tmp_path / 'a.jsonl')!r}), [*RECORDS])\n"
    script += f"prepare(make_config(p, Path({str(tmp_path / 'out')!r}), workers=2))\n"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    words = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.splitlines()[-1]
    assert "DataError: a worker process could not start; its messages above say why. A script that calls" in last


@pytest.mark.parametrize("refused", ["ensure_running", "connect_to_new_process"], ids=["server", "worker"])
def test_too_few_open_files_for_the_workers(
    refused: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the process that forks them, nor for the first of them."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(f"multiprocessing.forkserver.{refused}", refuse)
    with pytest.raises(DataError, match=r"could not be started: Too many open files\. Lower --workers, .*ulimit -n"):
        prepare(make_config(folder, tmp_path / "out", workers=2))
    assert not [*tmp_path.glob(".out*")]


BAD_UTF8: list[str | bytes] = ['{"text": "before \\ud83d after"}', b'{"text": "caf\xe9"}']


def test_invalid_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*RECORDS, *BAD_UTF8])
    out = prepare(make_config(source, tmp_path / "out", on_bad="replace"))
    manifest = load_manifest(out).document
    assert (manifest["replaced"], manifest["dropped"]) == (2, {})
    assert [message.split(": ")[1].split(" ")[0] for message in manifest["bad"]] == ["lone", "invalid"]
    assert {"before \ufffd after", "caf\ufffd"} <= read_texts(out)


def write_damaged_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"some text " * 100)[:-30])


def write_damaged_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1 and then nothing of the kind")


def write_truncated_zstd(path: Path) -> None:
    """Write a whole frame, then one that ends early."""
    frame = zstandard.compress(random.Random(0).randbytes(9000).hex().encode())
    path.write_bytes(frame + frame[:-30])


@pytest.mark.parametrize(
    ("name", "damage"),
    [("z.txt.gz", write_damaged_gzip), ("z.txt.zst", write_truncated_zstd), ("z.parquet", write_damaged_parquet)],
)
def test_a_damaged_file_stops_or_is_skipped(name: str, damage: object, folder: Path, tmp_path: Path) -> None:
    damage(folder / name)  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"{name}.*damaged.*--on_bad skip"):
        prepare(make_config(folder, tmp_path / "out"))
    out = prepare(make_config(folder, tmp_path / "out", on_bad="skip"))
    assert load_manifest(out).document["dropped"] == {"damaged": 1}


@pytest.mark.parametrize(
    ("ending", "compress", "damage"), [(".gz", gzip.compress, 8), (".zst", zstandard.compress, 1)], ids=["gz", "zst"]
)
def test_truncated_files_of_lines_stop_or_are_skipped(
    ending: str, compress: Callable[[bytes], bytes], damage: int, tmp_path: Path
) -> None:
    """Files of two members or frames, of which the second is truncated within its checksum or last block."""
    whole, cut = tmp_path / f"a.jsonl{ending}", tmp_path / f"b.jsonl{ending}"
    first, second = ("".join(line + "\n" for line in part).encode() for part in (RECORDS[:40], RECORDS[40:]))
    whole.write_bytes(compress(first) + compress(second))
    assert read_texts(prepare(make_config(whole, tmp_path / "whole"))) == {json.loads(line)["text"] for line in RECORDS}
    cut.write_bytes(compress(first) + compress(second)[:-damage])
    with pytest.raises(
        DataError, match=rf"b\.jsonl{ending}: compressed file ends early or is damaged after \d\d lines"
    ):
        prepare(make_config(cut, tmp_path / "cut"))
    # Nothing tells how much of it is missing: it counts whole.
    with pytest.raises(
        DataError, match=r"(\d+) of \1 bytes of input are zero or in files that cannot be read to their end, more than"
    ):
        prepare(make_config(cut, tmp_path / "cut", on_bad="skip"))
    out = prepare(make_config(cut, tmp_path / "cut", on_bad="skip", max_bad=1.0))
    assert load_manifest(out).document["dropped"] == {"damaged": 1}
    assert load_manifest(out).document["damaged_bytes"] == cut.stat().st_size


def test_sources_of_the_same_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other" / "text"))
    for path in other.iterdir():
        path.write_text("another " + path.read_text())
    sources = {"sources": [str(folder), str(other)]}
    out = prepare(make_config(folder, tmp_path / "out", **sources))
    names = [record["path"] for record in load_manifest(out).document["inputs"]]
    assert (names[0], names[-1]) == ("0:text/00.txt", "1:text/59.txt")
    assert len(set(names)) == 2 * len(RECORDS)
    (folder / "03.txt").write_text("something else")
    with pytest.raises(ConfigError, match=r"0:text/03\.txt has changed"):
        prepare(make_config(folder, out, **sources))


def test_no_shard_is_larger_than_asked(folder: Path, tmp_path: Path) -> None:
    (folder / "long.txt").write_text("".join(json.loads(line)["text"] for line in RECORDS))
    out = prepare(make_config(folder, tmp_path / "out", shard_bytes=400))
    shards = load_manifest(out).document["splits"]["train"]["shards"]
    assert all(shard["bin_bytes"] <= 400 or shard["documents"] == 1 for shard in shards)
    assert max(shard["bin_bytes"] for shard in shards) > 400, "a document is never cut"
    assert max(shard["documents"] for shard in shards) > 1


def test_too_many_bad_records_stop_the_job(tmp_path: Path) -> None:
    def make_lines(bad: int) -> Iterator[str]:
        yield from RECORDS
        yield from ("{" for _ in range(bad))

    few = write_lines(tmp_path / "few.jsonl", list(make_lines(BAD_LISTED)))
    prepare(make_config(few, tmp_path / "few", on_bad="skip"))
    many = write_lines(tmp_path / "many.jsonl", list(make_lines(BAD_LISTED + 1)))
    with pytest.raises(DataError, match=r"21 of 81 records are bad, more than --max_bad 0\.001; the first:"):
        prepare(make_config(many, tmp_path / "many", on_bad="skip"))
    prepare(make_config(many, tmp_path / "many", on_bad="skip", max_bad=0.5))


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.dat"
    source.write_text("\n\n".join(json.loads(line)["text"] for line in RECORDS))
    with pytest.raises(ConfigError, match=r"a\.dat ends with none of \.txt"):
        prepare(make_config(source, tmp_path / "out"))
    out = prepare(make_config(source, tmp_path / "out", extensions=[".DAT"], valid_fraction=0.0))
    assert load_manifest(out).document["splits"]["train"]["documents"] == 1


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
def test_an_output_without_a_name(out: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="must end with the name of a directory"):
        prepare(dataclasses.replace(make_config(folder, Path("x")), out=out))
