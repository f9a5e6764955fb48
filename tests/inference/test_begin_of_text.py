"""A prompt is encoded as the documents of the training began: after BOS where they did, without it elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.convert import convert
from megatron_rdt.inference import generate, load
from megatron_rdt.inference.text import generate_texts
from megatron_rdt.train.trainer import train
from tests.evaluate.task_groups import task_options, write_task_corpus
from tests.train.runs import read_records

PROMPT = "def main"


def make_run(configure: Callable[..., RunConfig], root: Path, options: list[str]) -> Path:
    """A finished run of a few steps with samples."""
    samples = ["--sample.every=2", f"--sample.prompt={PROMPT}", "--sample.loops=[2]", "--sample.tokens=6"]
    words = [f"--run.root={root}", "--eval.every=0", *options, "--train.steps=2", *samples, "--sample.temperature=0"]
    assert train(configure(*words)) == 0
    return root / "run"


@pytest.mark.parametrize("has_bos", [True, False])
def test_prompts_begin_as_documents_did(
    has_bos: bool, configure: Callable[..., RunConfig], tiny_corpus: Path, tmp_path: Path
) -> None:
    options = task_options(write_task_corpus(tmp_path / "c", tiny_corpus)) if has_bos else []
    run = make_run(configure, tmp_path / "runs", options)
    model, tokenizer = load(run)
    ids = tokenizer.encode(PROMPT)
    expected_ids = [tokenizer.bos, *ids] if has_bos else ids
    assert tokenizer.begins_with_bos is has_bos
    assert tokenizer.encode_document(PROMPT) == expected_ids
    with torch.no_grad():
        (expected,) = generate(model, [expected_ids], 2, 6, temperature=0, eos=tokenizer.eos)
    settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert generate_texts(str(run), [PROMPT], 2, 6, **settings) == [tokenizer.decode(expected)]
    (sample,) = read_records(run / "samples.jsonl")
    assert PROMPT + sample["text"] == tokenizer.decode(expected)

    export = convert(str(run), str(tmp_path / "export"), "hf")
    assert load(export)[1].encode_document(PROMPT) == expected_ids
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(export)
    assert exported(PROMPT).input_ids == expected_ids
    assert exported(PROMPT, add_special_tokens=False).input_ids == ids
    assert exported.decode(expected_ids, skip_special_tokens=True) == PROMPT
    back = convert(str(export), str(tmp_path / "back"), "native")
    assert load(back)[1].encode_document(PROMPT) == expected_ids
