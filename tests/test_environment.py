"""Environments of processes that share the machine."""

import pytest

from megatron_rdt.environment import share_environment


def test_a_share_of_the_cores_unless_the_user_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert share_environment(3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert share_environment(3)["OMP_NUM_THREADS"] == "1"


def test_gpus_are_numbers_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert share_environment(1, [2, 0])["CUDA_VISIBLE_DEVICES"] == "7,4"
    assert share_environment(1)["CUDA_VISIBLE_DEVICES"] == "4,6,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert share_environment(1, [2, 0])["CUDA_VISIBLE_DEVICES"] == "2,0"
