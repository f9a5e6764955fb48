"""Leases: held while their task is alive, taken over when it has died."""

import os
import subprocess
import sys
from pathlib import Path

from data_prep.jobs.leases import EXPIRE_S, Leases, hold_leases


def test_a_live_task_keeps_its_lease_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    with hold_leases(tmp_path, "a") as first, hold_leases(tmp_path, "b") as second:
        assert first.acquire("step")
        assert not second.acquire("step")
        old = os.stat(tmp_path / "step").st_mtime - EXPIRE_S
        os.utime(tmp_path / "step", (old, old + 1))
        assert not second.acquire("step"), "not expired yet"
        first.renew()
        assert os.stat(tmp_path / "step").st_mtime > old + 2
        os.utime(tmp_path / "step", (old, old - 1))
        assert second.acquire("step"), "its owner died"
        second.release("step")
        assert first.acquire("other")
        assert Leases(tmp_path, "a").acquire("other"), "a task that was killed and started again gets its leases back"
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        (tmp_path / "third").write_text(f"c\n{os.uname().nodename}\n{ended.pid}\n")
        assert first.acquire("third"), "a process of this machine that has ended holds nothing"
        (tmp_path / "fourth").write_text(f"c\nelsewhere\n{ended.pid}\n")
        assert not first.acquire("fourth"), "a process of another machine may be running"
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} <= {"step", "fourth"}
