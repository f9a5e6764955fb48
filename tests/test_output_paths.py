"""Paths of results: links are followed, mount points and folders of others are refused before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rdt import output_paths
from megatron_rdt.errors import ConfigError
from megatron_rdt.output_paths import (
    check_can_be_renamed_to,
    check_output_file,
    is_mount_point,
    make_parent,
    resolve_output_directory,
)


def test_a_link_names_the_directory_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "corpus").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/corpus")
    assert resolve_output_directory(tmp_path / "link") == tmp_path / "disk" / "corpus"
    assert resolve_output_directory(f"{tmp_path}/link/") == tmp_path / "disk" / "corpus"
    assert resolve_output_directory(tmp_path / "new" / "corpus") == tmp_path / "new" / "corpus"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_output_directory("~/corpus") == tmp_path / "corpus"


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "corpus")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "loop"):
        with pytest.raises(ConfigError, match=rf"{name} is a link to .*, which does not exist\. Mount its disk"):
            resolve_output_directory(tmp_path / name)


@pytest.mark.parametrize("out", ["", ".", "/", "..", "a/.."])
def test_a_directory_needs_a_name(out: str) -> None:
    with pytest.raises(ConfigError, match=r"OUT is .* it must end with the name of a directory"):
        resolve_output_directory(out, "OUT")


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    check_can_be_renamed_to(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"disk is a mount point.* Name a directory below it, such as .*/disk/new\."):
        check_can_be_renamed_to(tmp_path / "disk")


def test_bound_directories_are_found_in_the_table_of_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of the same file system, for which `os.path.ismount` returns False; spaces are octal in the table."""
    bound, table = tmp_path / "my disk", tmp_path / "mountinfo"
    bound.mkdir()
    point = str(bound).replace(" ", "\\040")
    table.write_text(f"29 1 254:0 / / rw - ext4 /dev/vda rw\n\n90 29 254:0 /a {point} rw - ext4 /dev/vda rw\n")
    monkeypatch.setattr(output_paths, "MOUNTS", str(table))
    assert is_mount_point(bound)
    assert not is_mount_point(tmp_path)
    monkeypatch.setattr(output_paths, "MOUNTS", str(tmp_path / "none"))
    assert not is_mount_point(bound)


BIND = "mkdir -p a b && mount --bind a b && exec {python} -c '{program}'"
PROGRAM = 'from megatron_rdt.output_paths import *; print(*map(is_mount_point, map(Path, [*"ab"])))'


def test_a_real_bind_mount(tmp_path: Path, repository: Path) -> None:
    """In a mount namespace of its own, which not every machine allows."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    words = ["unshare", "--mount", "sh", "-c", BIND.format(python=sys.executable, program=PROGRAM)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    result = subprocess.run(words, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "False True\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_parent(tmp_path / "a" / "b" / "corpus")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be made: .* Choose another --out\."):
        make_parent(tmp_path / "file" / "corpus")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        ConfigError, match=r"/a is not writable, and corpus is put together there\. Choose another OUT\."
    ):
        make_parent(tmp_path / "a" / "corpus", "OUT")


def test_a_directory_of_another_user_in_a_sticky_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "corpus").mkdir()
    check_can_be_renamed_to(tmp_path / "corpus")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    check_can_be_renamed_to(tmp_path / "new")
    with pytest.raises(ConfigError, match="corpus belongs to another user"):
        check_can_be_renamed_to(tmp_path / "corpus")


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("folder/new.json")
    (tmp_path / "dangling").symlink_to("absent/new.json")
    for name in ("file", "folder/new.json", "link"):
        check_output_file(tmp_path / name)
    for name, message in (
        ("absent/new.json", "cannot be written: .*/absent does not exist"),
        ("dangling", "cannot be written: .*/absent does not exist"),
        ("file/new.json", "cannot be written: .*/file is not a directory"),
        ("folder", "is a directory, it must be a file"),
        ("pipe", "is a device or pipe, it must be a file"),
    ):
        with pytest.raises(ConfigError, match=rf"--out .*{name} {message}\. Choose another --out\."):
            check_output_file(tmp_path / name)
    with pytest.raises(ConfigError, match="is a device or pipe"):
        check_output_file(Path("/dev/null"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="is not writable"):
        check_output_file(tmp_path / "new.json")


def test_nothing_is_written_into_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000001"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    resolve_output_directory(checkpoint / "hf")  # a corpus has a manifest.json too
    (checkpoint / "trainer.json").write_text("{}")
    (tmp_path / "link").symlink_to(checkpoint)
    for inside in (checkpoint / "hf", checkpoint / "model" / "new" / "hf", tmp_path / "link" / "hf"):
        with pytest.raises(ConfigError, match=r"OUT .* lies in the checkpoint .*step-00000001\. Choose a path outside"):
            resolve_output_directory(inside, "OUT")
    with pytest.raises(ConfigError, match="lies in the checkpoint"):
        check_output_file(checkpoint / "plan.json")
    resolve_output_directory(tmp_path / "hf")
