"""The manifest accounts for every record that was read; records that do not add up stop the prep."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_prep.pipeline import prepare
from data_prep.stages import write_manifest
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import DataError
from tests.data_prep.small_corpora import RECORDS, make_config, write_lines


@pytest.mark.parametrize(
    "changes", [{}, {"dedup": "near"}, {"max_documents": 20}, {"part_bytes": 500, "min_chars": 30}]
)
def test_records_are_kept_or_dropped_for_a_reason(changes: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    lines: list[str | bytes] = [*RECORDS, *RECORDS[:7], "{", '{"text": 3}', b'{"text": "\xff"}', '{"text": " "}', ""]
    random.Random(0).shuffle(lines)
    write_lines(source / "a.jsonl", lines)
    (source / "b.txt").write_text("a text file")
    (source / "c.txt.gz").write_bytes(gzip.compress(b"a text")[:-9])
    manifest = load_manifest(prepare(make_config(source, tmp_path / "out", on_bad="skip", **changes))).document
    kept = sum(split["documents"] for split in manifest["splits"].values())
    assert manifest["records"] == kept + sum(manifest["dropped"].values())
    if "max_documents" not in changes:
        assert manifest["records"] == len(lines) - 1 + 2, "an empty line is no record"
        assert manifest["input_bytes"] == sum(path.stat().st_size for path in source.iterdir())
    else:
        assert 0 < manifest["input_bytes"] <= (source / "a.jsonl").stat().st_size
    if not changes:
        dropped = {"bad_field": 1, "bad_json": 1, "bad_utf8": 1, "damaged": 1, "duplicate": 7, "empty": 1}
        assert manifest["dropped"] == dropped


def test_records_that_do_not_add_up_stop_the_prep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", list(RECORDS))
    sum_scans = write_manifest.sum_scans
    monkeypatch.setattr(write_manifest, "sum_scans", lambda work: sum_scans(work) | {"records": 61})
    with pytest.raises(
        DataError, match=r"61 records were read, but 60 are kept and 0 dropped: .*\.out\.prep do not belong"
    ):
        prepare(make_config(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_summary_says_how_many_records_were_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*RECORDS, RECORDS[0], "{"])
    prepare(make_config(source, tmp_path / "out", on_bad="skip"))
    printed = capsys.readouterr().out.splitlines()
    assert "records: 62 read, 60 kept, 2 dropped" in printed
    assert "dropped: 1 bad_json, 1 duplicate" in printed


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz"])
def test_a_file_that_the_disk_does_not_return_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with `on_bad: skip`: it is not the content that is bad."""
    path = tmp_path / name
    path.write_bytes(json.dumps({"text": "some"}).encode() + b"\n")

    def fail(*_: object) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_prep.sources.records.open_decompressed", fail)
    with pytest.raises(DataError, match=rf"{name} cannot be read: Input/output error"):
        prepare(make_config(path, tmp_path / "out", on_bad="skip"))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_an_empty_file_is_an_empty_record(name: str, tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    write_lines(source / "a.jsonl", list(RECORDS))
    (source / name).touch()
    manifest = load_manifest(prepare(make_config(source, tmp_path / "out"))).document
    assert (manifest["records"], manifest["dropped"]) == (61, {"empty": 1})


def test_a_prompt_field_that_no_record_has_is_refused(tmp_path: Path) -> None:
    """A misspelt name would train on the prompts of none."""
    lines: list[str | bytes] = [json.dumps({"question": "why", **json.loads(line)}) for line in RECORDS]
    source = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(
        DataError, match=r'none of 60 documents has a prompt in the field "questoin"\. Check --prompt_field'
    ):
        prepare(make_config(source, tmp_path / "out", prompt_field="questoin"))
    assert not (tmp_path / ".out.prep").exists()
    prepare(make_config(source, tmp_path / "out", prompt_field="question"))
