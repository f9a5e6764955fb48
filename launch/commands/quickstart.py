"""`rdt quickstart`: the whole pipeline: a model whose depth pays, and real text from raw files to a report."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.command_options import parse_options, summary_of
from launch.commands.compare import compare
from launch.commands.eval import evaluate
from launch.commands.prep import prep
from launch.commands.prep_show import show
from launch.commands.prep_tasks import tasks
from launch.commands.prep_verify import verify
from launch.local_processes import run_processes
from megatron_rdt.config import load_config
from megatron_rdt.errors import EXIT_OK, LaunchError
from megatron_rdt.run_directory import run_directory_of

CONFIG, DATA_CONFIG, TASKS_CONFIG = (
    "configs/quickstart.yaml",
    "configs/smoke_data.yaml",
    "configs/quickstart_tasks.yaml",
)
DEPTH_CONFIG, DEPTH_TASKS_CONFIG = "configs/quickstart_depth.yaml", "configs/quickstart_depth_data.yaml"
DEPTH_TEXT = "data/quickstart_depth"
DEPTH_AXIS, DEPTH_LOOPS = "model.window=2,0", "1,2,4,8,12,16,24,32"
WINDOW_REMARK = (
    "All saw the same examples. With a window of 2 (window=2) a token sees its neighbour only, and information moves one "
    "position per iteration: the architecture itself then forces one step per loop. Full attention (window=0) has no such limit."
)
STREAM_CONFIG, STREAM_STEPS = "configs/smoke.yaml", 5
TASKS = "hops,product:S5,addition,modular"
TASKS_TEXT = "data/tasks-text"
MOST_PROCESSES = 2
EVAL_LOOPS = (1, 2, 4, 8)
SAMPLE_LOOPS = (1, 8)
SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class QuickstartOptions:
    """Options of `rdt quickstart`, which takes none."""


def _print_title(began: float, text: str) -> None:
    """Print the headline of the step that begins, with the seconds since `began`."""
    print(f"\n== {time.monotonic() - began:5.0f} s  {text}", flush=True)


def quickstart(words: list[str]) -> int:
    """Run the whole pipeline: a model whose depth pays beside its controls, then real text; prep, train, eval, report."""
    parse_options("quickstart", summary_of(quickstart), QuickstartOptions, words)
    if not Path(CONFIG).is_file():
        raise LaunchError(f"{CONFIG} is not here. Run the quickstart from the root of the repository.")
    began = time.monotonic()
    print_title = functools.partial(_print_title, began)
    status = _show_depth(print_title) or _pretrain_on_text(print_title)
    if status:
        return status
    print_title("report")
    from megatron_rdt.evaluate.report import write_report

    depth = run_directory_of(load_config(DEPTH_CONFIG))
    comparison = depth.with_name(f"{depth.name}-compare")
    report = write_report(run_directory_of(load_config(CONFIG)), comparison, WINDOW_REMARK)
    print(f"\nDone in {time.monotonic() - began:.0f} s. The report is at {report.resolve()}")
    return EXIT_OK


def _show_depth(print_title: Callable[[str], None]) -> int:
    """Train, score and compare the model whose depth pays; return an exit status, 0 if all went well."""
    print_title("words of a group: n dependent steps, with the answer to every prefix")
    tasks(["--config", DEPTH_TASKS_CONFIG, "--restart"])
    prep(["--config", f"{DEPTH_TEXT}/prep.yaml"])
    print_title("a model of 29 thousand weights learns words of up to 8 elements")
    status = run_processes(["--config", DEPTH_CONFIG, "--resume", "auto"], 1)
    if status:
        return status
    print_title("longer words, more loops")
    config = load_config(DEPTH_CONFIG)
    evaluate([str(run_directory_of(config)), "--tasks", "--loops", ",".join(map(str, config.eval.loops))])
    print_title("the same with full attention, and both beside models that run once: equal weights, equal operations")
    words = ["--axis", DEPTH_AXIS, "--arms", "looped,unlooped,untied", "--eval.loops", DEPTH_LOOPS, "--sequences", "64"]
    return compare(["--config", DEPTH_CONFIG, *words])


def _pretrain_on_text(print_title: Callable[[str], None]) -> int:
    """Prepare text and problems, pretrain on them, evaluate and generate; return an exit status, 0 if all went well."""
    config = load_config(CONFIG)
    run_directory = run_directory_of(config)
    print_title("preparing text: duplicates and noise removed, tokenizer, token shards")
    prep(["--config", DATA_CONFIG])
    print_title("preparing problems with answers")
    tasks(["--task", TASKS, "--difficulty", "1,4", "--out", TASKS_TEXT, "--restart"])
    prep(["--config", TASKS_CONFIG])
    print_title("reading every byte of both once more, and a look at what a model will see")
    for corpus in config.data.corpora():
        verify([corpus.path])
        show([corpus.path, "--samples", "1", "--sequence_length", "128"])
    print_title("a quick look: a few steps on the problems as they come, without shards")
    look = {"run.name": f"{config.run.name}-look", "train.steps": STREAM_STEPS, "eval.every": 0, "sample.every": 0}
    look |= {"data.path": f"hf:{TASKS_TEXT}", "data.tokenizer": "data/stdlib/tokenizer", "logging.every": 1}
    options = [f"--{name}={value}" for name, value in look.items()]
    status = run_processes(["--config", STREAM_CONFIG, "--resume", "auto", *options], 1)
    if status:
        return status
    processes = _count_processes()
    print_title(f"pretraining on {processes} process{'es' if processes > 1 else ''}")
    words = ["--config", CONFIG, "--resume", "auto", "--train.precision", _choose_precision()]
    status = run_processes(words, processes)
    if status:
        return status
    print_title("validation loss against the number of loops")
    from megatron_rdt.evaluate.loss import evaluate_checkpoint
    from megatron_rdt.inference import generate_text

    # The windows that training was validated on: the report's curves show losses of the same tokens.
    evaluate_checkpoint(str(run_directory), EVAL_LOOPS, config.eval.sequences)
    print_title("text at two loop counts")
    for loops in SAMPLE_LOOPS:
        text = generate_text(str(run_directory), config.sample.prompt, loops, SAMPLE_TOKENS, 0.8, 50, 1.0, 0)
        print(f"--- T = {loops}\n{text}")
    return EXIT_OK


def _count_processes() -> int:
    """Return two, or one on a machine with a single GPU: each process needs its own."""
    import torch

    return min(torch.cuda.device_count() or MOST_PROCESSES, MOST_PROCESSES)


def _choose_precision() -> str:
    """Return the precision in which this machine trains faster, bfloat16 or float32."""
    import torch

    from megatron_rdt.train.hardware import multiplies_bfloat16_faster

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if multiplies_bfloat16_faster(device) else "float32"
