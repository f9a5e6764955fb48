"""Environments of processes that share the machine."""

import os

import pytest

from megatron_rdt import environment
from megatron_rdt.environment import (
    ALLOCATOR_VARIABLES,
    count_threads,
    prefer_expandable_segments,
    share_environment,
    use_safe_path,
)


@pytest.mark.parametrize(
    ("variable", "threads"), [(None, 4), ("3", 3), ("16", 16), ("2,1", 2), ("", 4), ("0", 4), ("many", 4)]
)
def test_a_share_of_the_cores_unless_the_user_says_it(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int
) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert count_threads(2) == threads
    assert share_environment(count_threads(2))["OMP_NUM_THREADS"] == str(threads)


def test_no_process_is_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert count_threads(10**6) == 1


@pytest.mark.parametrize("before", [None, "", "1"])
def test_a_safe_path_is_one_for_the_block(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONSAFEPATH", before)
    with use_safe_path():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ.get("PYTHONSAFEPATH") == before


def test_gpus_are_numbers_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert share_environment(1, [2, 0])["CUDA_VISIBLE_DEVICES"] == "7,4"
    assert share_environment(1)["CUDA_VISIBLE_DEVICES"] == "4,6,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert share_environment(1, [2, 0])["CUDA_VISIBLE_DEVICES"] == "2,0"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
    ids=str,
)
def test_segments_of_gpu_memory_grow_unless_the_user_configured_them(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prefer_expandable_segments()
    assert {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ} == expected
