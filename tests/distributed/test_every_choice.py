"""Every choice of the model and the depth trains from YAML under FSDP2 on two processes, resumes exactly, and generates.

One process group runs all combinations one after another. Together they have every choice of every axis, which a test
compares with the schema.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_rdt.config import DepthConfig, ModelConfig, OptimizerConfig
from tests.distributed.every_choice_worker import check_all
from tests.distributed.processes import run_on_processes

STEPS, HALF = 27, 18
MLA = {"attention": "mla", "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
MOE = {"core_ffn": "moe", "experts": 4, "experts_per_token": 2, "expert_dim": 24, "shared_expert_dim": 40}
# What needs a corpus of examples is trained in tests/train/test_example_run.py.
ELSEWHERE = {"scheme": {"difficulty"}, "difficulty_offset": {1.0}}
COMBINATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {
        "model": {"injection": "diagonal", "discretization": "zoh", "state_init": "zero"},
        "depth": {"scheme": "lognormal_poisson", "per": "step"},
    },
    "huginn": {
        "model": {
            "injection": "linear",
            "norm_placement": "sandwich",
            "core_norm": "last_shared",
            "encoded_norm": False,
            "qk_bias": True,
            "rope_pairing": "adjacent",
            "scale_embedding": True,
            "state_init": "normal",
        },
        "optimizer": {"state_dtype": "bfloat16", "ema": 0.9},
        "depth": {"scheme": "poisson", "per": "micro_batch", "backprop": 2, "checkpoint": "per_iteration"},
    },
    "parcae": {
        "model": {
            "discretization": "euler",
            "input_matrix": True,
            "output_matrix": True,
            "value_embeddings": "gated",
            "qk_norm": "plain",
            "ffn": "relu2",
            "ffn_dim": 80,
        },
        "depth": {"scheme": "geometric", "bounds": "truncate", "per": "sequence", "backprop": 3},
        "optimizer": {"name": "muon"},
    },
    "mythos": {
        "model": {
            **MLA,
            **MOE,
            "query_rank": 16,
            "injection": "residual",
            "signals": ["sinusoidal", "lora"],
            "halting": "act",
            "state_init": "encoded",
        },
        "depth": {"scheme": "fixed", "mean": 3},
        "optimizer": {"name": "muon", "nesterov": False},
    },
    "ouro": {
        "model": {
            "injection": "add",
            "norm_placement": "peri",
            "core_norm": "iteration",
            "halting": "gate",
            "state_init": "embedding",
            "tie_embeddings": False,
            "positions": "none",
        },
        "depth": {"scheme": "uniform", "per": "accumulation_step", "curriculum": "linear", "curriculum_steps": 15},
    },
    "no injection": {
        "model": {
            "injection": "none",
            "norm_placement": "post",
            "core_norm": "iteration",
            "final_norm": False,
            "encoded_norm": False,
            "state_init": "encoded",
            "qk_norm": "joint",
            "value_bias": True,
            "rope_scaling": "llama3",
            "rope_factor": 2.0,
            "rope_slow_turns": 0.5,
            "rope_fast_turns": 2.0,
            "rope_original_length": 16,
            "attention_dim": 48,
            "vocab_size": 576,
            "unused_ids": 64,
        },
        "depth": {"per": "sequence"},
    },
    "hyper": {
        "model": {
            "injection": "hyper",
            "lanes": 3,
            "signals": ["adaln"],
            "state_init": "learned",
            "qk_norm": "learned",
            "window": 7,
        },
        "depth": {
            "per": "sequence",
            "backprop": 2,
            "curriculum": "one_minus_sqrt",
            "curriculum_steps": 15,
            "curriculum_of": "both",
            "checkpoint": "per_iteration",
        },
        "data": {"document_mask": True, "document_positions": True, "pack": "bestfit"},
    },
    "gate": {
        "model": {"injection": "gate", "core_norm": "last", "logit_softcap": 15.0},
        "depth": {"curriculum": "linear", "curriculum_steps": 15, "curriculum_of": "backprop", "backprop": 3},
        "train": {"z_loss": 1e-4, "precision": "bfloat16"},
    },
}


def make_settings(parts: dict[str, dict[str, Any]], root: Path, corpus: Path) -> dict[str, Any]:
    """The content of the YAML of one combination."""
    sizes = {"vocab_size": 512, "dim": 32, "prelude_layers": 1, "core_layers": 2, "coda_layers": 1}
    return {
        "run": {"root": str(root)},
        "model": {**sizes, "heads": 4, "kv_heads": 2, **parts["model"]},
        "depth": {"mean": 2, "max": 5, **parts["depth"]},
        "train": {
            "steps": STEPS,
            "global_batch": 8,
            "micro_batch": 2,
            "sequence_length": 24,
            "device": "cpu",
            **parts.get("train", {}),
        },
        "optimizer": {"lr": 5e-3, **parts.get("optimizer", {})},
        "schedule": {"warmup_steps": 5},
        "parallel": {"engine": "fsdp"},
        "checkpoint": {"every": HALF, "keep": 0},
        "data": {"path": str(corpus), "max_epochs": 100, **parts.get("data", {})},
        "eval": {"every": 0},
        "logging": {"tensorboard": False, "every": STEPS, "monitor_every": 7, "jacobian_every": 16},
    }


@pytest.mark.parametrize("schema", [ModelConfig, DepthConfig, OptimizerConfig], ids=lambda s: s.__name__)
def test_the_combinations_have_every_choice(schema: type) -> None:
    """Every name, both values of a switch, and a value above 0 of every number that switches off at 0."""
    section = {ModelConfig: "model", DepthConfig: "depth", OptimizerConfig: "optimizer"}[schema]
    for field in dataclasses.fields(schema):
        kind = typing.get_type_hints(schema)[field.name]
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        default = [] if field.default is dataclasses.MISSING else field.default
        values = [parts.get(section, {}).get(field.name, default) for parts in COMBINATIONS.values()]
        found = {choice for value in values for choice in (value if isinstance(value, list) else [value])}
        found |= ELSEWHERE.get(field.name, set()) if schema is DepthConfig else set()
        if typing.get_origin(inner) is Literal:
            assert found >= set(typing.get_args(inner)), f"{section}.{field.name}"
        elif inner is bool:
            assert found == {True, False}, f"{section}.{field.name}"
        elif default == 0:
            assert max(found) > 0, f"{section}.{field.name}"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_every_choice_trains_resumes_and_generates(tiny_corpus: Path, tmp_path: Path) -> None:
    combinations = {name: make_settings(parts, tmp_path / "runs", tiny_corpus) for name, parts in COMBINATIONS.items()}
    verdicts = run_on_processes(check_all, 2, combinations, tmp_path, timeout=590)[0]
    print(json.dumps(verdicts, indent=1))
    assert set(verdicts) == set(COMBINATIONS)
    for name, verdict in verdicts.items():
        assert verdict["steps"] == STEPS, name
        assert verdict["last"] < verdict["first"] - 0.5, (name, verdict)
        assert verdict["resumed_exactly"], name
        assert verdict["same_text_without_cache"], name
        assert verdict["same_text_with_exits"], name
        assert verdict["stopped_early"], name
        assert verdict["monitored"] == [7, 14, 16, 21], name
