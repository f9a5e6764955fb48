"""`rdt generate`: several prompts, streaming, stop texts, exit rules, and what it refuses."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import run_command
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.inference import generate, load, stream_text
from megatron_rdt.inference.text import decode_pieces, describe_extrapolation, to_stop_ids
from megatron_rdt.train.trainer import train

PROMPTS = ["def main(", "import os, sys", "class A:"]


@pytest.fixture(scope="module")
def run(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("text")
    assert train(configure(f"--run.root={root}", "--train.steps=2", "--eval.every=0")) == 0
    return str(root / "run")


def run_generate(capsys: pytest.CaptureFixture[str], run: str, *words: str) -> str:
    assert run_command(["generate", run, "--tokens=12", "--loops=3", *words]) == 0
    return capsys.readouterr().out


def test_several_prompts(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", PROMPTS[0], f"--prompt={PROMPTS[1]}", "--prompt", PROMPTS[2], "--temperature=0"]
    together = run_generate(capsys, run, *words)
    alone = [run_generate(capsys, run, "--prompt", prompt, "--temperature=0") for prompt in PROMPTS]
    assert together == "".join(f"--- {i}\n{text}" for i, text in enumerate(alone, start=1))
    assert all(text.startswith(prompt) for text, prompt in zip(alone, PROMPTS))
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    assert run_generate(capsys, run, "--prompts", str(file), "--temperature=0") == together
    file.write_text("\n".join(PROMPTS[1:]))
    assert run_generate(capsys, run, "--prompt", PROMPTS[0], "--prompts", str(file), "--temperature=0") == together


def test_streaming_prints_the_same_text(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", PROMPTS[0], "--seed=4"]
    text = run_generate(capsys, run, *words)
    assert run_generate(capsys, run, *words, "--stream") == text
    parts = list(stream_text(run, PROMPTS[0], 3, 12, temperature=0.8, top_k=50, seed=4))
    assert "".join(parts) + "\n" == text
    assert len(parts) > 4


def test_a_character_of_several_tokens_is_streamed_whole(run: str) -> None:
    _, tokenizer = load(run, "cpu")
    ids = tokenizer.encode("a\U0001f600b")
    assert len(ids) > 4, "the emoji should be spelled in bytes"
    parts = list(decode_pieces(tokenizer, ids[:1], iter(ids[1:])))
    assert "".join(parts) == "a\U0001f600b"
    assert "\ufffd" not in "".join(parts)


def test_stop_texts_and_ids(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(run, "cpu")
    prompt = tokenizer.encode("def ")
    free = generate(model, [prompt], 3, 12, temperature=0.8, top_k=50)[0]
    last = free[len(prompt) + 3]
    expected = tokenizer.decode(free[: free.index(last, len(prompt)) + 1])
    assert run_generate(capsys, run, f"--stop_ids={last},{last}") == f"{expected}\n"
    assert run_generate(capsys, run) == f"{tokenizer.decode(free)}\n"
    ends = {text: to_stop_ids(tokenizer, [text]) for text in ("\n", ":", " =")}
    assert all(tokenizer.processor.id_to_piece(id).replace("\u2581", " ") == text for text, (id,) in ends.items())
    at_ends = generate(model, [prompt], 3, 12, temperature=0.8, top_k=50, stop=[id for (id,) in ends.values()])[0]
    assert run_generate(capsys, run, f"--stop={json.dumps(list(ends))}") == f"{tokenizer.decode(at_ends)}\n"


def test_an_exit_rule_reports_its_mean_iterations(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, used in ((["change", "--exit_threshold=1e9"], 1), (["kl", "--exit_threshold=0"], 3)):
        assert run_command(["generate", run, "--tokens=4", "--loops=3", "--exit", *words]) == 0
        assert capsys.readouterr().err == f"iterations per token: {used:.2f} of 3\n"
    exact = run_generate(capsys, run, "--cache_budget=3")
    assert exact == run_generate(capsys, run) == run_generate(capsys, run, "--exit=change", "--exit_threshold=0")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--exit=kl"], "--exit kl needs --exit_threshold"),
        (["--exit=kl_entropy", "--exit_threshold=1"], "--exit kl_entropy needs --exit_entropy"),
        (["--exit_threshold=1"], "--exit fixed takes no --exit_threshold"),
        (["--exit=act", "--exit_threshold=1.5"], "from 0 to 1"),
        (["--exit=change", "--exit_threshold=1", "--exit_hits=0"], "hits 0"),
        (["--exit=change", "--exit_threshold=1", "--exit_min_loops=0"], "min_loops 0"),
        (["--exit=change", "--exit_threshold=1", "--exit_min_loops=9"], "--exit_min_loops is 9, but T is"),
        (["--exit=change", "--exit_threshold=1", "--exit_hits=9"], "--exit_hits is 9, but T is"),
        (["--exit_in_order=true"], "for rules that stop tokens early"),
        (["--exit=gate", "--exit_threshold=0.5"], "for models with model.halting: gate"),
        (["--exit=other"], "--exit"),
        (["--cache_budget=-1"], "--cache_budget is -1"),
        (["--stop=hello world"], "tokens"),
        (["--stop_ids=100000"], "--stop_ids has 100000"),
        (["--prompt=a", "--prompt=b", "--stream"], "--stream is for one prompt, there are 2"),
        (["--prompts=absent.txt"], "absent.txt cannot be read"),
        (["--prompt=a", "--prompt="], "the prompt is empty"),
        (["--prompt=", "--prompt=a"], "the prompt is empty"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "--prompt=a"], "--prompt needs a value"),
        (["--prompt", "--tokens=3", "--prompt", "a"], "--prompt needs a value"),
    ],
)
def test_invalid_options_are_refused(words: list[str], text: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", run, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rdt generate: error: ")
    assert text in captured.err
    assert captured.out == ""


def test_what_goes_beyond_training_is_said(run: str, caplog: pytest.LogCaptureFixture) -> None:
    file = Path(run) / "config.yaml"
    trained = load_config(file).train.sequence_length
    assert describe_extrapolation(Path(run), 1, trained) == []
    for path in (Path(run), Path(run) / "latest", Path(run) / "checkpoints" / "step-00000002"):
        longer, deeper = describe_extrapolation(path, 1000, trained + 1)
        assert f"have up to {trained + 1} tokens, sequences in training had {trained}" in longer
        assert "T is 1000, training draws at most " in deeper
    with caplog.at_level(logging.WARNING):
        assert run_command(["generate", run, "--tokens=1", "--loops=1", "--prompt", "x = 1\n" * trained]) == 0
    assert f"sequences in training had {trained}: what the model says there is not trained" in caplog.text
