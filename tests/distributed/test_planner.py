"""Planned communication equals what engines send, call by call and byte by byte; planned memory is close."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_engines import start

WORKER = Path(__file__).parent / "planner_worker.py"

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("planner") / "verdict.json"
    result = start("torchrun", [str(WORKER), "--out", str(out)], repository, 230)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(out.read_text())


def test_planned_collectives_are_the_counted_ones(verdict: dict[str, Any]) -> None:
    assert len(verdict["sent"]) == 22
    wrong = {
        f"{name}, T = {loops}": {
            key: (each["counted"].get(key), each["planned"].get(key))
            for key in {*each["counted"], *each["planned"]}
            if each["counted"].get(key) != each["planned"].get(key)
        }
        for name, case in verdict["sent"].items()
        for loops, each in case.items()
    }
    assert {name: keys for name, keys in wrong.items() if keys} == {}
    for case in verdict["sent"].values():
        assert case["1"]["counted"]


def test_planned_memory_is_within_a_tenth_of_the_measured(verdict: dict[str, Any]) -> None:
    for rows in verdict["memory"]:
        assert [row["loops"] for row in rows] == [1, 8]
        for row in rows:
            print(row["loops"], row["peak"], row["planned"])
            assert row["planned"] == pytest.approx(row["peak"], rel=0.1)
