"""Compressed files of every kind that their tools write are read whole; a lack of memory is not taken for damage."""

import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import zstandard

from data_prep.sources import compression
from data_prep.sources.inputs import cut_parts, list_input_files
from data_prep.sources.records import PartReader
from megatron_rdt.errors import DataError
from tests.data_prep.small_corpora import RECORDS, make_config

LINES = ("\n".join(RECORDS) + "\n").encode()
TEXTS = [json.loads(line)["text"] for line in RECORDS]
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a frame that pzstd writes before each of its frames


def read_file(path: Path, **options: object) -> list[str]:
    """Read the texts of a file."""
    settings = make_config(path, Path("unused"), **options)
    return [d.text for part in cut_parts(settings, list_input_files(settings)) for d in PartReader(part, settings)]


def compress_with_window(content: bytes, log: int) -> bytes:
    """Compress a stream of unknown length with a window of 2**log bytes, as `zstd --long=LOG` does."""
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    compressed = stream.compress(content) + stream.flush()
    assert zstandard.get_frame_parameters(compressed).window_size == 1 << log
    return compressed


@pytest.mark.parametrize("log", [27, 28, 30, 31])
def test_zstd_with_long_windows(log: int, tmp_path: Path) -> None:
    if psutil.virtual_memory().available < 3 << log:
        pytest.skip("needs three times the window in memory")
    path = tmp_path / "a.jsonl.zst"
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-q", "-1", f"--long={log}", "-o", str(path)], input=LINES, check=True)
    else:
        path.write_bytes(compress_with_window(LINES, log))
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << log
    assert read_file(path) == TEXTS


def test_frames_and_members_one_after_another(tmp_path: Path) -> None:
    half = LINES.index(b"\n", len(LINES) // 2)
    pieces = LINES[:half], LINES[half:]
    zst, gz = tmp_path / "a.jsonl.zst", tmp_path / "a.jsonl.gz"
    zst.write_bytes(b"".join(SKIPPABLE + zstandard.compress(piece) for piece in pieces) + SKIPPABLE)
    gz.write_bytes(b"".join(map(gzip.compress, (pieces[0], b"", pieces[1]))) + bytes(512))
    assert read_file(zst) == read_file(gz) == TEXTS


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_lack_of_memory_is_not_damage(on_bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress_with_window(LINES, 28))
    monkeypatch.setattr(compression, "LARGEST_WINDOW", 1 << 27)
    with pytest.raises(
        DataError, match=r"a\.jsonl\.zst: no memory to decompress it .*2 GiB per worker: lower --workers"
    ):
        read_file(path, on_bad=on_bad)


def test_the_reason_of_a_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(LINES))
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged after \d+ lines \(zstd decompressor error: .*checksum\)"):
        read_file(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_an_empty_file_is_not_a_compressed_one(name: str, tmp_path: Path) -> None:
    """As a download leaves it that was interrupted at once."""
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name}: compressed file ends early .*the file is empty"):
        read_file(tmp_path / name)
    assert read_file(tmp_path / name, on_bad="skip") == []


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_compressed_files_by_another_name(
    ending: str, compress: Callable[[bytes], bytes], twice: bool, tmp_path: Path
) -> None:
    """They are not text, whatever `on_bad` makes of bytes that are not UTF-8; nor are those that are compressed twice."""
    path = tmp_path / f"a.txt{ending if twice else ''}"
    path.write_bytes(compress(compress(LINES)) if twice else compress(LINES))
    for on_bad in ("error", "replace"):
        with pytest.raises(DataError, match=rf"{path.name}: it is compressed: add \{ending} to its name"):
            read_file(path, on_bad=on_bad)
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(compress(LINES))
    with pytest.raises(DataError, match=rf"a\.jsonl:1: (invalid UTF-8 .*)?it is compressed: add \{ending} to its name"):
        read_file(lines)
