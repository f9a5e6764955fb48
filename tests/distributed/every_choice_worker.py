"""Train every combination under FSDP2, resume it in its middle, and generate; runs on every rank."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_rdt import load
from megatron_rdt.checkpoint import Start
from megatron_rdt.config import RunConfig, check_config, load_config
from megatron_rdt.inference import generate
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace
from megatron_rdt.run_directory import run_directory_of
from megatron_rdt.train.stop_request import StopRequest
from megatron_rdt.train.trainer import Trainer


def train_run(config: RunConfig, source: Path | None) -> Path:
    """Train in this process group, from `source` or from scratch, and return the run's directory."""
    check_config(config, dist.get_world_size())
    stop, directory = StopRequest(), run_directory_of(config)
    trainer = Trainer(config, directory, torch.device("cpu"), stop)
    try:
        assert trainer.run(None if source is None else Start(source)) == 0
    finally:
        trainer.close()
        stop.close()
    dist.barrier()
    return directory


def read_losses(run_directory: Path) -> dict[int, float]:
    """Losses by step."""
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


@torch.no_grad()
def check_exits(model: RecurrentDepthTransformer, prompt: torch.Tensor) -> dict[str, bool]:
    """Check that tokens stop earlier with a wider threshold, and that text is the same with and without a cache."""
    trace, iterations = ExitTrace(), []
    for threshold in (0.05, 1.6):
        model(prompt, 5, exit_rule=ExitRule("change", threshold), trace=trace)
        iterations.append(float(trace.iterations.double().mean()))
    rule = ExitRule("change", 0.4)
    texts = [
        generate(model, prompt, 5, 8, seed=1, exit_rule=rule, use_cache=cached).tolist() for cached in (True, False)
    ]
    return {"same_text_with_exits": texts[0] == texts[1], "stopped_early": iterations[1] < iterations[0]}


def check_combination(name: str, config_file: Path, half: int) -> dict[str, object]:
    """Train and resume one combination, generate from it, and return the findings."""
    began = time.monotonic()
    straight = train_run(load_config(config_file, {"run.name": name}), None)
    source = straight / "checkpoints" / f"step-{half:08d}"
    resumed = train_run(load_config(config_file, {"run.name": f"{name}-resumed"}), source)
    expected, again = read_losses(straight), read_losses(resumed)
    verdict: dict[str, object] = {
        "steps": len(expected),
        "first": sum(expected[step] for step in range(1, 6)) / 5,
        "last": sum(expected[step] for step in sorted(expected)[-5:]) / 5,
        "resumed_exactly": sorted(again) == list(range(half + 1, len(expected) + 1))
        and all(again[step] == expected[step] for step in again),
    }
    if dist.get_rank() == 0:
        model, tokenizer = load(straight, "cpu")
        prompt = torch.tensor([tokenizer.encode("def "), tokenizer.encode("def ")])
        texts = [
            generate(model, prompt, 3, 12, temperature=0.7, seed=1, use_cache=cached).tolist()
            for cached in (True, False)
        ]
        verdict["same_text_without_cache"] = texts[0] == texts[1]
        verdict |= check_exits(model, prompt)
        records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
        verdict["monitored"] = [
            record["step"] for record in records if "iterations" in record or "jacobian_norm" in record
        ]
    verdict["seconds"] = time.monotonic() - began
    dist.barrier()
    return verdict


def check_all(combinations: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, object]]:
    """The findings of every combination; its config is written to `folder`."""
    verdicts = {}
    for name, config in combinations.items():
        file = folder / f"{name}.yaml"
        if dist.get_rank() == 0:
            file.write_text(yaml.safe_dump(config))
        dist.barrier()
        verdicts[name] = check_combination(name, file, config["checkpoint"]["every"])
    return verdicts
