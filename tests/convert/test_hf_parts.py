"""Exports of models with every part: transformers gives the same logits, with and without its cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_rdt.config import check_config, load_config
from megatron_rdt.convert import convert
from megatron_rdt.inference import load
from megatron_rdt.train.trainer import train
from tests.distributed.test_every_choice import COMBINATIONS, make_settings

FOREIGN = """
import json, sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_rdt", "launch", "data_prep"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
verdict = {}
for name, folder in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    given = torch.load(folder + "/../given.pt")
    tokens = given["tokens"]
    with torch.no_grad():
        worst = max(
            float((model(tokens, loops=loops).logits - expected).abs().max())
            for loops, expected in given["logits"].items()
        )
    settings = dict(do_sample=False, max_new_tokens=10, eos_token_id=-1, loops=3)
    padded = torch.cat((torch.full((1, 3), 3), tokens[:1, :9]), 1)
    batch = torch.cat((tokens[1:2, :12], padded))
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    together = model.generate(batch, attention_mask=mask, **settings)
    alone = model.generate(tokens[:1, :9], **settings)
    verdict[name] = {
        "difference": worst,
        "cached": torch.equal(together, model.generate(batch, attention_mask=mask, use_cache=False, **settings)),
        "padded": torch.equal(together[1, 3:], alone[0]),
    }
print(json.dumps(verdict))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_transformers_gives_the_same_for_every_part(tiny_corpus: Path, tmp_path: Path) -> None:
    folders = {}
    for name, parts in COMBINATIONS.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(make_settings(parts, tmp_path / name, tiny_corpus)))
        options = {"parallel.engine": "single", "train.steps": 3, "schedule.warmup_steps": 1}
        config = load_config(file, options)
        check_config(config, 1)
        assert train(config) == 0
        run = tmp_path / name / config.run.name
        folders[name] = str(convert(str(run), str(tmp_path / name / "hf"), "hf"))
        model, _ = load(run)
        tokens = torch.randint(4, 512, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = {loops: model(tokens, loops) for loops in (1, 3, 6)}
        torch.save({"tokens": tokens, "logits": logits}, tmp_path / name / "given.pt")
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    result = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(tmp_path / "folders.json")],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    verdict = json.loads(result.stdout.splitlines()[-1])
    assert set(verdict) == set(folders)
    for name, found in verdict.items():
        assert found["difference"] < 1e-5, (name, verdict)
        assert found["cached"], (name, verdict)
        assert found["padded"], (name, verdict)
