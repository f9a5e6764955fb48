"""The commands of docs/OPERATIONS.md below a heading with the word Slurm run as written on the cluster."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.operations_page import run_blocks

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]


def test_the_commands_of_the_page(cluster: "Cluster", tmp_path: Path, tiny_text: Path) -> None:
    said = run_blocks("tests/cluster/test_operations.py", tmp_path, tiny_text, cluster.environment, timeout_s=450)
    assert "submitted job" in said
