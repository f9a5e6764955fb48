"""An export generates as our own code does: with every kind of cache, every T and exit rule, wherever they are set.

These tests import nothing of this project: `make test-exports` runs them in fresh environments, with several versions of
transformers.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
VARIANTS = ("plain", "latent", "valued", "gated")
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 3}
Load = Callable[..., Any]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_cache_gives_the_tokens_of_our_own_generation(name: str, load: Load, given: Load) -> None:
    model, expected = load(name), given(name)
    prompt = expected["tokens"][:1, :9]
    for loops, continued in expected["continued"].items():
        for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            got = model.generate(prompt, loops=loops, **settings, **GREEDY)
            assert torch.equal(got, continued), (loops, settings)
    assert len({tuple(row[0].tolist()) for row in expected["continued"].values()}) > 1


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["change", "kl"])
def test_exit_rules(name: str, kind: str, load: Load, given: Load) -> None:
    model, expected = load(name), given(name)
    rule = {"exit": kind, "exit_threshold": {"change": 0.9, "kl": 0.3}[kind], "exit_min_loops": 2}
    with torch.no_grad():
        logits = model(expected["tokens"], loops=6, **rule).logits
    torch.testing.assert_close(logits, expected["exits"][kind], atol=1e-4, rtol=1e-4)
    got = model.generate(expected["tokens"][:1, :9], loops=6, **rule, **GREEDY)
    assert torch.equal(got, expected["continued_exits"][kind])


def test_settings_are_taken_from_the_call_a_generation_config_and_the_config(load: Load, given: Load) -> None:
    model, expected = load(), given()
    prompt = expected["tokens"][:1, :9]
    config = transformers.GenerationConfig(loops=2, **GREEDY)
    for implementation in (None, "static"):
        config.cache_implementation = implementation
        assert torch.equal(model.generate(prompt, config), expected["continued"][2])
        assert torch.equal(model.generate(prompt, generation_config=config, loops=6), expected["continued"][6])
    assert torch.equal(model.generate(prompt, **GREEDY), expected["continued"][4])  # the default of the export
    model.config.loops = 6
    assert torch.equal(model.generate(prompt, **GREEDY), expected["continued"][6])
    assert torch.equal(model.generate(prompt, cache_implementation="static", **GREEDY), expected["continued"][6])
    torch.testing.assert_close(model(expected["tokens"]).logits, expected["logits"][6], atol=1e-4, rtol=1e-4)
    model.generation_config.loops = 2
    assert torch.equal(model.generate(prompt, **GREEDY), expected["continued"][2])
    del model.generation_config.loops
    model.config.exit, model.config.exit_threshold, model.config.exit_min_loops = "change", 0.9, 2
    assert torch.equal(model.generate(prompt, **GREEDY), expected["continued_exits"]["change"])
    assert torch.equal(model.generate(prompt, exit="fixed", **GREEDY), expected["continued"][6])
    assert torch.equal(
        model.generate(prompt, exit="kl", exit_threshold=0.3, exit_min_loops=2, **GREEDY),
        expected["continued_exits"]["kl"],
    )


def test_a_cache_budget(load: Load, given: Load) -> None:
    model, expected = load(), given()
    prompt = expected["tokens"][:1, :9]
    got = model.generate(prompt, loops=6, cache_budget=2, **GREEDY)
    assert torch.equal(got, expected["continued_budget"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_threshold": 0.1}, "takes no exit_threshold"),
        ({"exit": "change"}, "needs exit_threshold"),
        ({"exit_min_loops": 2}, "for rules that stop tokens early"),
        ({"exit": "change", "exit_threshold": 0.1, "cache_implementation": "static"}, "does not go together"),
        ({"cache_budget": 2, "use_cache": False}, "no meaning without a cache"),
        ({"cache_budget": 2, "cache": "dynamic"}, "needs a LoopCache"),
        ({"loops": 0}, "at least 1"),
        ({"loops": True}, "loops is True; give a whole number"),
        ({"loops": "x"}, "loops is 'x'; give a whole number"),
        ({"cache_budget": -1}, "cache_budget is -1; give a whole number of at least 0"),
        ({"cache_budget": 1.5}, "cache_budget is 1.5"),
        ({"exit": "change", "exit_threshold": "low"}, "exit_threshold is 'low'; give a number"),
        ({"exit": "change", "exit_threshold": 0.1, "exit_hits": "x"}, "exit_hits is 'x'"),
        ({"exit": "change", "exit_threshold": 0.1, "exit_min_loops": 5}, "exit_min_loops is 5, but T is 4"),
        ({"exit": "change", "exit_threshold": 0.1, "exit_hits": 3, "loops": 2}, "exit_hits is 3, but T is 2"),
        ({"exit": "change", "exit_threshold": 0.1, "exit_in_order": 1}, "exit_in_order is 1"),
        ({"loop": 2}, "loop"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(
    settings: dict[str, Any], message: str, load: Load, given: Load
) -> None:
    model, settings = load(), dict(settings)
    if settings.pop("cache", None):
        settings["past_key_values"] = transformers.DynamicCache()
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(given()["tokens"][:1, :9], **settings, **GREEDY)


def test_settings_that_cannot_work_are_refused_in_the_config_and_at_a_forward_pass(
    load: Load, given: Load, exports: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports / "plain", tmp_path / "copy"))
    settings = json.loads((folder / "config.json").read_text())
    rule = {"exit": "change", "exit_threshold": 0.1}
    cases = (
        ({"loops": "x"}, "loops is 'x'"),
        ({"loops": True}, "loops is True"),
        ({"cache_budget": -1}, "cache_budget is -1"),
        ({"exit_threshold": 0.1}, "takes no exit_threshold"),
        ({**rule, "exit_min_loops": 9}, "exit_min_loops is 9, but T is 4"),
    )
    model, tokens = load(), given()["tokens"]
    for wrong, message in cases:
        (folder / "config.json").write_text(json.dumps({**settings, **wrong}))
        with pytest.raises(ValueError, match=message):
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        with pytest.raises(ValueError, match=message):
            model(tokens, **wrong)


def test_no_tokens_and_too_short_a_cache_end_in_a_sentence(load: Load, given: Load) -> None:
    model, tokens = load(), given()["tokens"]
    with pytest.raises(ValueError, match=r"shape \(1, 0\): there is none"):
        model(tokens[:1, :0])
    with pytest.raises(ValueError, match="there are no tokens"):
        model.generate(tokens[:1, :0], **GREEDY)
    with torch.no_grad():
        short = transformers.StaticCache(config=model.config, max_cache_len=10)
        with pytest.raises(
            ValueError, match=r"the cache holds 10 positions, this call needs 20; make it with max_cache_len=20"
        ):
            model(tokens, past_key_values=short)
        short = transformers.StaticCache(config=model.config, max_cache_len=10)
        model(tokens[:, :10], past_key_values=short)
        with pytest.raises(ValueError, match="holds 10 positions, this call needs 11"):
            model(tokens[:, 10:11], past_key_values=short)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_and_beams(name: str, load: Load, given: Load) -> None:
    model, expected = load(name), given(name)
    tokens = expected["tokens"]
    batch = torch.stack((tokens[0, :9], torch.cat((torch.full((4,), 3), tokens[1, :5]))))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    for settings in ({}, {"cache_implementation": "static"}):
        got = model.generate(batch, attention_mask=mask, loops=4, **settings, **GREEDY)
        assert got[0].tolist() == expected["continued_padded"][0], settings
        assert got[1, 4:].tolist() == expected["continued_padded"][1], settings
    settings = {**GREEDY, "num_beams": 3, "loops": 3}
    cached = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(cached, model.generate(batch, attention_mask=mask, use_cache=False, **settings))
    rule = {"exit": "change", "exit_threshold": 0.9}
    assert model.generate(batch, attention_mask=mask, **rule, **settings).shape == cached.shape


def test_caches_that_the_caller_makes(load: Load, given: Load) -> None:
    model, expected = load(), given()
    tokens, config = expected["tokens"], model.config
    for loops in (6, 1):  # more and fewer than the default
        for cache in (
            transformers.DynamicCache(),
            transformers.DynamicCache(config=config),
            transformers.StaticCache(config=config, max_cache_len=32),
        ):
            with torch.no_grad():
                model(tokens[:, :9], loops=loops, past_key_values=cache)
                with pytest.raises(ValueError, match=f"filled at T = {loops}, this call has T = {loops + 1}"):
                    model(tokens[:, 9:10], loops=loops + 1, past_key_values=cache)
                got = model(tokens[:, 9:], loops=loops, cache=cache).logits
            torch.testing.assert_close(got, expected["logits"][loops][:, 9:], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="two names"):
        model(tokens, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", ["plain", "latent"])
def test_a_quantised_cache(name: str, load: Load, given: Load) -> None:
    pytest.importorskip("optimum.quanto")
    model, expected = load(name), given(name)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    got = model.generate(expected["tokens"][:, :16], loops=4, **settings, **GREEDY)
    assert got.shape == (2, 28)


def test_stop_strings_and_streaming(load: Load, given: Load, exports: Any) -> None:
    model, expected = load(), given()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exports / "plain", trust_remote_code=True)
    prompt = expected["tokens"][:1, :9]
    text = tokenizer.decode(expected["continued"][4][0, 9:])
    stop = text[len(text) // 2 :][:2]
    got = model.generate(prompt, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)
    assert got.shape[1] < prompt.shape[1] + 12
    assert stop in tokenizer.decode(got[0, 9:])


def test_a_prompts_full_logits_are_never_made(load: Load, given: Load) -> None:
    model, expected = load(), given()
    sizes: list[int] = []
    model.model.head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    model.generate(expected["tokens"], **GREEDY)
    assert set(sizes) == {1}
    tokens, logits = expected["tokens"], expected["logits"][3]
    with torch.no_grad():
        for keep, selected in (
            (4, logits[:, -4:]),
            (torch.tensor([2, 5]), logits[:, [2, 5]]),
        ):
            got = model(tokens, loops=3, logits_to_keep=keep).logits
            torch.testing.assert_close(got, selected, atol=1e-4, rtol=1e-4)


def test_assisted_generation_takes_loops_of_its_own(load: Load, given: Load) -> None:
    model, assistant, expected = load(), load(), given()
    assistant.config.loops = 1
    prompt = expected["tokens"][:1, :9]
    got = model.generate(prompt, loops=6, assistant_model=assistant, **GREEDY)
    assert torch.equal(got, expected["continued"][6])
