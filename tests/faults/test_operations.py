"""The commands of docs/OPERATIONS.md that need no Slurm run as written, in their order."""

from pathlib import Path

import pytest

from tests.operations_page import run_blocks

pytestmark = [pytest.mark.faults, pytest.mark.timeout(420)]


def test_the_commands_of_the_page(tmp_path: Path, tiny_text: Path) -> None:
    said = run_blocks("tests/faults/test_operations.py", tmp_path, tiny_text, {}, timeout_s=400)
    assert "running" in said
