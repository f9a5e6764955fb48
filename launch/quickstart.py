"""The whole main job in one call: prep, train on two processes, evaluate, generate, report."""

import time
from pathlib import Path

from launch.local import run_processes
from megatron_rdt.config import load_config
from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.errors import LaunchError

CONFIG, DATA_CONFIG = "configs/quickstart.yaml", "configs/smoke_data.yaml"
MOST_PROCESSES = 2
EVAL_LOOPS = (1, 2, 4, 8, 16)
EVAL_SEQUENCES = 64
SAMPLE_LOOPS = (1, 8)
SAMPLE_TOKENS = 60


def quickstart() -> int:
    """Run every step, print each with its time; the last line says where the report is."""
    if not Path(CONFIG).is_file():
        raise LaunchError(f"{CONFIG} is not here. Run the quickstart from the root of the repository.")
    began = time.monotonic()
    config = load_config(CONFIG)
    run_directory = Path(config.run.root) / config.run.name

    def title(text: str) -> None:
        print(f"\n== {time.monotonic() - began:5.0f} s  {text}", flush=True)

    title("preparing text: tokenizer and token shards")
    from data_prep.config import PrepConfig
    from data_prep.pipeline import prepare

    prep, _ = parse(make_parser(PrepConfig, "rdt prep", ""), PrepConfig, ["--config", DATA_CONFIG])
    prepare(prep)
    processes = _processes()
    title(f"pretraining on {processes} process{'es' if processes > 1 else ''}")
    status = run_processes(["--config", CONFIG, "--resume", "auto"], processes)
    if status:
        return status
    title("validation loss against the number of loops")
    from megatron_rdt.evaluate.loss import evaluate_checkpoint
    from megatron_rdt.evaluate.report import write_report
    from megatron_rdt.inference import generate_text

    evaluate_checkpoint(str(run_directory), EVAL_LOOPS, EVAL_SEQUENCES)
    title("text at two depths")
    for loops in SAMPLE_LOOPS:
        text = generate_text(str(run_directory), config.sample.prompt, loops, SAMPLE_TOKENS, 0.8, 50, 1.0, 0)
        print(f"--- T = {loops}\n{text}")
    title("report")
    report = write_report(run_directory)
    print(f"\nDone in {time.monotonic() - began:.0f} s. The report is at {report.resolve()}")
    return 0


def _processes() -> int:
    """Two, or as many as there are GPUs where there are fewer: each process takes one of its own."""
    import torch

    return min(torch.cuda.device_count() or MOST_PROCESSES, MOST_PROCESSES)
