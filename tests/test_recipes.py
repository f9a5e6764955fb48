"""The recipes of CONTRIBUTING.md work: their code, added to a copy of the tree, does what it says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import read_recipes

PREAMBLE = """
import json
from pathlib import Path
import torch
from megatron_rdt.config import load_config
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.planner.run_plan import make_plan
from megatron_rdt.devices import DEVICES
MODEL = {"vocab_size": 32, "dim": 16, "ffn_dim": 16}


def configure(**sections):
    Path("config.yaml").write_text(json.dumps(sections))
    return load_config("config.yaml")
"""
CHECKS = {
    "Add an injection": """
config = configure(model=MODEL | {"injection": "leaky"})
model, tokens = initialize(RecurrentDepthTransformer(config.model), 0), torch.zeros(2, 5, dtype=torch.int64)
model(tokens, 3, targets=tokens)["objective"].backward()
assert all(p.grad is not None for p in model.parameters())
assert abs(model.spectral_radius() - 0.4975) < 1e-6
assert make_plan(config, 1, DEVICES["h100"], 0.4, advise=False).memory.peak > 0
""",
    "Add a distribution of T": """
from megatron_rdt.depth.distributions import loop_probabilities
for bounds, mean, expected in (("clamp", 3, {1: 0.5, 5: 0.5}), ("clamp", 5, {1: 0.5, 6: 0.5}), ("truncate", 5, {1: 1.0})):
    config = configure(depth={"scheme": "two_point", "mean": mean, "max": 6, "bounds": bounds})
    assert {t: p for t, p in enumerate(loop_probabilities(config.depth)) if p} == expected
""",
    "Add an engine": """
from megatron_rdt.data.batch import Batch
from megatron_rdt.parallel import MicroBatch, make_engine
config = configure(model=MODEL, parallel={"engine": "flat"})
engine = make_engine(config, torch.device("cpu"))
with torch.device("meta"):
    model = RecurrentDepthTransformer(config.model)
engine.setup(model)
losses = engine.forward_backward([MicroBatch(Batch(torch.zeros(2, 6, dtype=torch.int64)), DepthPlan.constant(2, 2))])
assert losses["objective"] > 0
assert engine.clip(1.0) > 0
engine.step(1e-3)
""",
    "Add a command": """
from launch.cli import run_command
Path("runs/first").mkdir(parents=True)
assert run_command(["runs"]) == 0
assert run_command(["runs", "--root", "nowhere"]) == 2
""",
    "Add a tokenizer library": """
from megatron_rdt.data import Tokenizer
Path("folder").mkdir()
Path("folder/tokenizer.bytes").touch()
for path in ("folder", "folder/tokenizer.bytes"):
    tokenizer = Tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("na\\u00efve </s>")) == "na\\u00efve </s>"
    assert (tokenizer.eos, tokenizer.vocab_size, len(tokenizer.token_bytes())) == (256, 257, 257)
""",
}


@pytest.mark.slow
def test_the_recipes_work(tmp_path: Path, repository: Path) -> None:
    """All in one copy of the tree and one process, since importing takes longer than the checks."""
    recipes = read_recipes()
    assert {recipe.title for recipe in recipes} == set(CHECKS)
    for package in ("megatron_rdt", "data_prep", "launch"):
        shutil.copytree(repository / package, tmp_path / package)
    for recipe in recipes:
        recipe.apply(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((PREAMBLE, *CHECKS.values()))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
