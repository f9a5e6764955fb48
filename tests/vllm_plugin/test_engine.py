"""vLLM with the plugin computes what the model computes; run by `make test-vllm`, in an environment that has vLLM."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here; `make test-vllm` makes an environment for it"),
    pytest.mark.distributed,
]
LOOPS = 6
PLAIN = {"dtype": "float32", "enforce_eager": True}


def serve(name: str, settings: dict[str, Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `engine_worker.py` with an export and settings of its loop."""
    environment = os.environ | {
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        # As many threads as this machine's settings say, wherever they run.
        **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"},
    }
    arguments = [
        str(Path(os.environ["RDT_EXPORTS"]) / name),
        json.dumps({**PLAIN, "hf_overrides": settings, **options}),
    ]
    command = [sys.executable, str(Path(__file__).with_name("engine_worker.py")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


def check(name: str, settings: dict[str, Any], continued: list[int], **options: Any) -> None:
    """Compare scores and continuation with those of our own code."""
    given = torch.load(Path(os.environ["RDT_EXPORTS"]) / name / "given.pt")
    run = serve(name, settings, **options)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    expected = given["logits"][settings["loops"]].log_softmax(-1)
    compared = 0
    for row, scores in zip(expected, result["scores"]):
        for position, entries in enumerate(scores[1:]):
            for token, score in entries.items():
                assert abs(score - float(row[position, int(token)])) < 1e-4
                compared += 1
    assert compared >= 3 * 2 * 19  # of each token but the first, the three likeliest
    assert result["continued"] == continued


def expected_tokens(name: str, kind: str = "continued") -> list[int]:
    """Return what our own code appends to the prompt."""
    given = torch.load(Path(os.environ["RDT_EXPORTS"]) / name / "given.pt")[kind]
    return (given if kind == "continued_budget" else given[LOOPS])[0, 9:].tolist()


@pytest.mark.parametrize("name", ["plain", "valued", "gated", "experts"])
def test_a_prompt_in_pieces_equals_the_model(name: str) -> None:
    pieces = {"max_num_batched_tokens": 7, "max_num_seqs": 2, "enable_chunked_prefill": True}
    check(name, {"loops": LOOPS}, expected_tokens(name), **pieces)


def test_the_compiled_model_equals_it() -> None:
    check("valued", {"loops": LOOPS}, expected_tokens("valued"), enforce_eager=False)


def test_two_processes_share_heads_and_channels() -> None:
    check("experts", {"loops": LOOPS}, expected_tokens("experts"), tensor_parallel_size=2)


def test_a_cache_budget() -> None:
    # A prompt in one piece: in several, later pieces see fewer iterations of the earlier ones.
    budget = {"loops": LOOPS, "cache_budget": 2}
    check("plain", budget, expected_tokens("plain", "continued_budget"), enable_prefix_caching=False)


def test_an_exit_rule_is_refused_with_a_sentence() -> None:
    run = serve("plain", {"exit": "change", "exit_threshold": 0.1})
    assert run.returncode != 0
    assert "every token runs all loops" in run.stdout + run.stderr
