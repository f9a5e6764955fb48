"""An export, used by transformers in a process that cannot import this package, equals the model."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import check_config, load_config
from megatron_rdt.convert import convert
from megatron_rdt.inference import generate, load
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.train.trainer import train

FOREIGN = """
import sys, torch
sys.path = [p for p in sys.path if p not in ("", {repository!r})]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_rdt", "launch", "data_prep"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
given = torch.load({given!r})
tokens = given["tokens"]
with torch.no_grad():
    for loops, expected in given["logits"].items():
        got = model(tokens, loops=loops).logits
        assert torch.allclose(got, expected, atol=1e-5), (loops, float((got - expected).abs().max()))
    spread = torch.arange(tokens.shape[1])[None] * 3
    got = model(tokens, loops=4, position_ids=spread).logits
    assert torch.allclose(got, given["spread"], atol=1e-5), float((got - given["spread"]).abs().max())
    assert not torch.allclose(got, given["logits"][4], atol=1e-3)
def fresh(seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model.config, trust_remote_code=True).state_dict()
first, same, other = fresh(1), fresh(1), fresh(2)
if model.config.tie_word_embeddings:
    assert torch.equal(first.pop("model.head.weight"), first["model.embedding.weight"])
constants = [name for name in first if any(part in name for part in ("norm", "injection", "bias"))]
assert len(constants) >= 6
for name, value in first.items():
    assert torch.equal(value, same[name]), name
    assert torch.equal(value, given["initial"][name.removeprefix("model.")]) == (name in constants), name
    assert torch.equal(value, other[name]) == (name in constants), name
    if name not in constants:
        expected = given["initial"][name.removeprefix("model.")].std()
        assert abs(value.std() / expected - 1) < 0.2, (name, value.std(), expected)
settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=-1, loops=4)
cached = model.generate(tokens[:1], **settings)
assert torch.equal(cached, model.generate(tokens[:1], use_cache=False, **settings))
assert torch.equal(cached, given["continued"]), (cached, given["continued"])
padded = torch.cat((torch.full((1, 3), 3), tokens[:1, :9]), 1)
batch = torch.cat((tokens[1:2, :12], padded))
mask = torch.ones_like(batch); mask[1, :3] = 0
both = model.generate(batch, attention_mask=mask, **settings)
alone = model.generate(tokens[:1, :9], **settings)
assert torch.equal(both[1, 3:], alone[0]), (both[1], alone[0])
assert model(tokens, labels=tokens).loss.isfinite()
model.save_pretrained({again!r})
again = AutoModelForCausalLM.from_pretrained({again!r}, trust_remote_code=True)
assert torch.equal(again(tokens, loops=3).logits, model(tokens, loops=3).logits)
try:
    model(tokens, loop=3)
except TypeError as error:
    assert "loop" in str(error)
else:
    raise AssertionError("loop")
for wrong in (0, -1, 2.5, "x"):
    try:
        model(tokens, loops=wrong)
    except ValueError as error:
        assert repr(wrong) in str(error)
    else:
        raise AssertionError(wrong)
for mine in (DynamicCache(), DynamicCache(config=model.config)):
    with torch.no_grad():
        for loops in (6, 2):  # more and fewer than the default
            mine = type(mine)() if mine.layer_class_to_replicate else type(mine)(config=model.config)
            model(tokens[:, :9], loops=loops, past_key_values=mine)
            for other in (loops + 1, 3):
                try:
                    model(tokens[:, 9:10], loops=other, past_key_values=mine)
                except ValueError as error:
                    assert f"filled at T = {{loops}}" in str(error) and f"has T = {{other}}" in str(error), error
                else:
                    raise AssertionError((loops, other))
            got = model(tokens[:, 9:], loops=loops, cache=mine).logits  # its name from transformers 5.24 on
            assert torch.allclose(got, model(tokens, loops=loops).logits[:, 9:], atol=1e-5), loops
try:
    model(tokens, cache=mine, past_key_values=mine)
except ValueError as error:
    assert "two names" in str(error)
else:
    raise AssertionError("two caches")
assert model.config.bos_token_id is tokenizer.bos_token_id is None  # a text corpus has none
assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id == 3
for text, ids in given["texts"]:
    assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
    assert tokenizer.decode(ids) == text
print("all equal")
"""


@pytest.mark.distributed
@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "extra",
    [
        [],
        [
            "--model.tie_embeddings=false",
            "--model.state_init=normal",
            "--model.core_ffn=moe",
            "--model.balance_rate=0.1",
        ],
    ],
)
def test_transformers_gives_the_same(
    extra: list[str], tmp_path: Path, tiny_options: list[str], repository: Path
) -> None:
    config = load_config(repository / "configs" / "smoke.yaml", [*tiny_options, *extra, f"--run.root={tmp_path}"])
    check_config(config, 1)
    assert train(config) == 0
    run = tmp_path / config.run.name
    folder = convert(str(run), str(tmp_path / "hf"), "hf")
    model, tokenizer = load(run)
    tokens = torch.randint(4, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {loops: model(tokens, loops) for loops in (1, 4, 8)}
        spread = model(tokens, 4, positions=3 * torch.arange(20))
    initial = dict(initialize(RecurrentDepthTransformer(config.model), 0).state_dict())
    continued = generate(model, tokens[:1], 4, 12, temperature=0)
    again, exported_tokenizer = load(folder)
    assert not again.training
    assert exported_tokenizer.fingerprint == tokenizer.fingerprint
    with torch.no_grad():
        assert all(torch.equal(again(tokens, loops), expected) for loops, expected in logits.items())
    texts = ["def f(x):\n\treturn  x + 1234\n", " lead  and trail ", "émoji 🎉 \x00 end", "▁"[:0] + "a\r\nb"]
    given = {
        "tokens": tokens,
        "logits": logits,
        "spread": spread,
        "initial": {name: value.detach() for name, value in initial.items()},
        "continued": continued,
        "texts": [(text, tokenizer.encode(text)) for text in texts],
    }
    torch.save(given, tmp_path / "given.pt")
    script = FOREIGN.format(
        repository=str(repository), folder=str(folder), given=str(tmp_path / "given.pt"), again=str(tmp_path / "again")
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all equal" in result.stdout
