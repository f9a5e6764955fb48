"""Files of records: disks that fail, lines that are cut short, and files that are moved, deleted or replaced."""

import errno
import io
import logging
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from megatron_rdt.files import DAMAGED, read_json_lines
from megatron_rdt.train import record_file
from megatron_rdt.train.metrics import Recorder, drop_records_after
from megatron_rdt.train.record_file import RecordFile


def read_steps(path: Path) -> list[object]:
    """The step of each record in a file, or DAMAGED."""
    return [value if value is DAMAGED else value["step"] for _, _, value in read_json_lines(path)]


def test_records_wait_for_a_disk_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of a file cuts a line in its middle, as a full disk does; later it is written to its end."""
    recorder, step = Recorder(tmp_path, tensorboard=False, start_step=0), 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        while (tmp_path / "metrics.jsonl").stat().st_size < 950:
            recorder.record_step({"step": step, "loss": 1.0})
            step += 1
        for _ in range(3):
            recorder.record_step({"step": step, "loss": 1.0, "text": "x" * 100})
            step += 1
        assert (tmp_path / "metrics.jsonl").stat().st_size == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("metrics.jsonl cannot be written (File too large); training goes on") == 1
    recorder.record_step({"step": step, "loss": 1.0})
    assert "metrics.jsonl is written again, and no record is lost" in caplog.text
    recorder.close()
    assert read_steps(tmp_path / "metrics.jsonl") == list(range(step + 1))


def test_records_that_were_never_written_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(record_file, "MOST_WAITING", 3)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    recorder = Recorder(tmp_path, tensorboard=False, start_step=0)
    for step in range(5):
        recorder.record_step({"step": step})
    recorder.close()
    assert caplog.text.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert "metrics.jsonl lacks 5 records" in caplog.text


@pytest.mark.parametrize("what", ["deleted", "moved", "replaced"])
def test_records_are_not_written_into_a_file_that_is_gone(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recorder = Recorder(run, tensorboard=False, start_step=0)
    recorder.record_step({"step": 1})
    if what == "deleted":
        (run / "metrics.jsonl").unlink()
    elif what == "moved":
        run.rename(tmp_path / "elsewhere")
    else:  # as an editor saves
        (run / "new").write_text((run / "metrics.jsonl").read_text())
        (run / "new").rename(run / "metrics.jsonl")
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            recorder.record_step({"step": step})
    recorder.close()
    assert caplog.text.count("metrics.jsonl was moved, deleted or replaced while the run writes it") == 1
    expected = [1, 2, 3] if what == "replaced" else [2, 3]
    assert read_steps(run / "metrics.jsonl") == expected


class SmallFile(io.FileIO):
    """A file on a disk with room for a few bytes."""

    room = 25

    def write(self, content: Any) -> int:
        """Write as much as there is room for."""
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = super().write(content[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("nothing", [1, 2, 3]),
        ("deleted", [2, 3]),
        ("copied", [1, DAMAGED, 2, 3]),
        ("emptied", [2, 3]),
        ("cut", [1, 2, 3]),
    ],
)
def test_a_line_that_was_written_in_part_begins_anew_in_another_file(
    what: str, kept: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest alone would be no record, and the record would be lost."""
    path = tmp_path / "metrics.jsonl"
    records = RecordFile(path)
    records.append({"step": 1})
    records._file.close()
    records._file = SmallFile(path, "ab")
    records.append({"step": 2, "loss": 3.25, "sources": {"a": 1}})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "loss": 3.25,'
    if what == "deleted":
        path.unlink()
    elif what == "copied":
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").rename(path)
    elif what in ("emptied", "cut"):
        os.truncate(path, 0 if what == "emptied" else len(b'{"step": 1}\n'))
    if isinstance(records._file, SmallFile):
        records._file.room = 1 << 20
    records.append({"step": 3})
    records.close()
    assert read_steps(path) == kept
    assert [value for _, _, value in read_json_lines(path)][-2] == {"step": 2, "loss": 3.25, "sources": {"a": 1}}
    assert "is written again, and no record is lost" in caplog.text
    said = drop_records_after(tmp_path, 3)
    assert read_steps(path) == [step for step in kept if step is not DAMAGED]
    assert bool(said) == (what == "copied")


def test_a_record_is_not_appended_to_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    records = RecordFile(path)
    records.append({"step": 3})
    records.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'
