"""Fixtures of the tests of exports: folders that this project made, here or before, and models that transformers loads."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# transformers copies the code of an export into this folder when it is imported, and reads the variable before that.
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the exports of `make_exports`: that of RDT_EXPORTS where it is set, as `make test-exports` does."""
    if "RDT_EXPORTS" in os.environ:
        return Path(os.environ["RDT_EXPORTS"])
    from tests.exports.make_exports import write_exports

    out = tmp_path_factory.mktemp("exports")
    write_exports(out)
    return out


@pytest.fixture
def load(exports: Path) -> Callable[..., Any]:
    """Function that loads the export of a variant."""

    def load_variant(name: str = "plain", **settings: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(exports / name, trust_remote_code=True, **settings).eval()

    return load_variant


@pytest.fixture
def given(exports: Path) -> Callable[..., dict[str, Any]]:
    """Function that reads what our own code computed with a variant."""
    return lambda name="plain": torch.load(exports / name / "given.pt")
