"""Scan rows: files written row by row, in memory that does not grow with the text."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep.jobs.working_directory import Job
from data_prep.sources.inputs import Input, Part
from data_prep.stages import scan_rows
from data_prep.stages.scan import scan_part, scan_record_path, scan_rows_path
from data_prep.stages.scan_rows import ArrayWriter
from tests.data_prep.small_corpora import make_config, write_lines


@pytest.mark.parametrize("rows", [0, 1, 4096, 10_000])
def test_arrays_are_written_row_by_row(rows: int, tmp_path: Path) -> None:
    expected = np.random.default_rng(rows).integers(0, 2**60, (rows, 3), dtype=np.uint64)
    with open(tmp_path / "a.npy", "wb") as file:
        writer = ArrayWriter(file, np.dtype("<u8"), (3,))
        for row in expected:
            writer.add(row)
        writer.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    assert len(np.load(tmp_path / "a.npy", mmap_mode="r" if rows else None)) == rows


def test_a_scan_takes_the_same_memory_for_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_rows, "ROWS_HELD", 256)
    peaks = []
    for size in (1000, 8000):
        path = write_lines(tmp_path / f"{size}.jsonl", [json.dumps({"text": f"{i} " * 30}) for i in range(size)])
        settings = make_config(path, tmp_path / "out", part_bytes=10**9)
        part = Part(0, "lines", (Input("a", str(path), path.stat().st_size, 0, False),), 0, 0, path.stat().st_size)
        job = Job(settings, tmp_path / f"work{size}", "id")
        tracemalloc.start()
        scan_part(job, part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(np.load(scan_rows_path(job, part))) == size
        assert job.read_record(scan_record_path(job, part))["documents"] == size  # type: ignore[index]
    assert peaks[1] < 2 * peaks[0]
