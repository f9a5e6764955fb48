"""lm-evaluation-harness on an export answers every type of request as our own code does, at the T of `model_args`.

These tests import nothing of this project: `make test-exports` runs them in fresh environments, with several versions of
transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip(
    "accelerate", reason="lm_eval needs accelerate for models of transformers; make test-exports has it"
)
huggingface = pytest.importorskip("lm_eval.models.huggingface")
pytestmark = pytest.mark.slow
Load = Callable[..., Any]


def open_model(folder: Path, arguments: str, **settings: Any) -> Any:
    words = f"pretrained={folder},trust_remote_code=True,dtype=float32,{arguments}"
    return huggingface.HFLM.create_from_arg_string(words, {"device": "cpu", "batch_size": 3, **settings})


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def cut(text: str, stops: list[str]) -> str:
    """The text up to the first of the stops in it."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@pytest.mark.parametrize("name", ["plain", "latent", "valued", "gated"])
def test_every_type_of_request(name: str, exports: Path, given: Load) -> None:
    requests, answers = given(name)["requests"], given(name)["answers"]
    for arguments, expected in answers.items():
        model = open_model(exports / name, arguments)
        assert model.max_length == 64
        scores = model.loglikelihood([ask(*pair) for pair in requests["pairs"]])
        for (score, likeliest), (own_score, own_likeliest) in zip(scores, expected["scores"]):
            assert score == pytest.approx(own_score, abs=2e-4, rel=1e-5), arguments
            assert likeliest == own_likeliest
        texts = model.loglikelihood_rolling([ask(text) for text in requests["texts"]])
        assert texts == pytest.approx(expected["texts"], abs=2e-4, rel=1e-5), arguments
        settings = {"until": requests["stops"], "max_gen_toks": requests["new_tokens"], "do_sample": False}
        continued = model.generate_until([ask(prompt, dict(settings)) for prompt in requests["prompts"]])
        # Decoded as transformers does it: bytes that are no UTF-8, of which a random model writes many, differ elsewhere.
        decoded = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected["continuations"]]
        assert continued == [cut(text, requests["stops"]) for text in decoded], arguments
    assert len({answer["texts"][0] for answer in answers.values()}) == len(answers)  # they depend on T and on the rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("loops=0", "at least 1"),
        ("loops=4,exit=change", "needs exit_threshold"),
        ("loops=4,exit_threshold=0.1", "takes no exit_threshold"),
    ],
)
def test_settings_that_cannot_be_are_an_error(arguments: str, message: str, exports: Path) -> None:
    model = open_model(exports / "plain", arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        model.loglikelihood([ask("a b", " c")])
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate_until([ask("a b", {"until": ["x"], "max_gen_toks": 4})])


def test_multiple_choice_from_a_local_file(exports: Path, given: Load, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"question": f"value {n} is", "choices": ["one", "x x x x", str(n)]}) + "\n" for n in range(9)
        )
    )
    task = {
        "task": "values",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": 2,
    }
    (tmp_path / "values.yaml").write_text(json.dumps(task))
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={exports / 'plain'},trust_remote_code=True,dtype=float32,loops=3",
        tasks=["values"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
    )
    model = open_model(exports / "plain", "loops=3", batch_size=1)
    right = 0
    for sample in found["samples"]["values"]:
        scores = model.loglikelihood([ask(*arguments) for arguments in sample["arguments"]])
        right += max(range(3), key=lambda choice: scores[choice][0]) == 2
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx([s for s, _ in scores], abs=1e-4)
    assert found["results"]["values"]["acc,none"] == right / 9
