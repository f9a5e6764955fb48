"""Identity of a file: other content or another file is noticed, what leaves the content alone is not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt.data.shard_files.file_identity import FileIdentity, identify_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def write_in_place(path: Path) -> None:
    path.write_bytes(b"another")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))  # the clock of a file system may be coarse


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(b"another")
    os.replace(path.with_name("new"), path)


def replace_and_keep_the_time(path: Path) -> None:
    before = path.stat()
    shutil.copyfile(path, path.with_name("kept"))  # its number must not become that of the new file
    replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [write_in_place, replace, replace_and_keep_the_time])
def test_a_replaced_file_is_another(file: Path, change: Callable[[Path], None]) -> None:
    before = identify_file(file)
    change(file)
    assert not identify_file(file).is_same_file(before)


def test_what_leaves_the_content_alone_is_the_same_file(file: Path, tmp_path: Path) -> None:
    before = identify_file(file)
    with open(file, "rb") as opened:
        assert identify_file(opened.fileno()) == before
    file.chmod(0o400)
    os.link(file, tmp_path / "link")
    os.rename(file, tmp_path / "renamed")
    assert identify_file(tmp_path / "renamed").is_same_file(before)


def test_a_file_system_may_number_files_anew() -> None:
    before = FileIdentity(7, 100, 1, 100)
    assert before._replace(inode=2).is_same_file(before)
    assert before._replace(changed_ns=200).is_same_file(before)
    assert not before._replace(inode=2, changed_ns=200).is_same_file(before)
    assert not before._replace(size=8).is_same_file(before)
    assert not before._replace(modified_ns=101).is_same_file(before)
