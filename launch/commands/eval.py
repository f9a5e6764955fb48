"""`rdt eval`: a checkpoint at several loop counts: its validation loss, its accuracy on tasks, or scores of lm_eval."""

from dataclasses import dataclass, field

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText
from megatron_rdt.run_directory import WeightKind


@dataclass(frozen=True)
class EvalOptions:
    """Options of `rdt eval`."""

    checkpoint: PathText
    """Checkpoint, or run directory (its newest healthy checkpoint)."""
    loops: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Loop counts T to evaluate at."""
    sequences: int = 64
    """Validation sequences to use, spread evenly over the split."""
    sequence_length: int = 0
    """Tokens of a validation sequence, with --harness most tokens of a context; 0: as many as in training, which of an imported model may be more than memory or the split can hold."""
    weights: WeightKind = "model"
    """Weights to measure: the model's, or their exponential moving average (of a run with optimizer.ema), whose results are written with --out only."""
    data: PathText | None = None
    """Directory of a prepared corpus; by default the run's own."""
    out: PathText | None = None
    """JSON file to write; by default eval.json (with --tasks eval-tasks.json, with --harness eval-harness.json) in the run directory, and none for a checkpoint outside a run."""
    tasks: bool = False
    """Instead of the loss, score the answers to the validation split's examples of tasks: exact match by difficulty and T."""
    examples: int = 200
    """tasks: largest number of examples of each task and difficulty."""
    exit_rules: list[str] = field(default_factory=list)
    """tasks: exit rules to score as well, at most the largest T, such as change:0.01,kl:1e-4 or kl_entropy:0.01:entropy=3:hits=2."""
    harness: list[str] = field(default_factory=list)
    """Instead of the loss, run these tasks and groups of lm-evaluation-harness, such as arc_easy,hellaswag; * stands for any characters."""
    harness_path: PathText | None = None
    """harness: folder with YAML files of further tasks."""
    limit: int = 0
    """harness: largest number of examples of each task; 0: all."""
    fewshot: int | None = None
    """harness: examples in each prompt; by default as many as the task says."""
    batch_size: int = 16
    """harness: requests per forward pass."""


def evaluate(words: list[str]) -> int:
    """Measure the validation loss of a checkpoint, its accuracy on tasks, or scores of lm_eval, at several loop counts."""
    options = parse_options("eval", summary_of(evaluate), EvalOptions, words)
    _check_options(options)
    common = (options.checkpoint, options.loops)
    if options.harness:
        from megatron_rdt.evaluate.harness import evaluate_harness

        evaluate_harness(
            *common,
            options.harness,
            path=options.harness_path,
            limit=options.limit,
            fewshot=options.fewshot,
            batch_size=options.batch_size,
            length=options.sequence_length,
            out=options.out,
            weights=options.weights,
        )
    elif options.tasks:
        from megatron_rdt.evaluate.task_evaluation import evaluate_tasks

        evaluate_tasks(
            *common, options.examples, options.data, options.out, options.exit_rules, weights=options.weights
        )
    else:
        from megatron_rdt.evaluate.loss import evaluate_checkpoint

        evaluate_checkpoint(
            *common, options.sequences, options.data, options.out, options.sequence_length, options.weights
        )
    return EXIT_OK


def _check_options(options: EvalOptions) -> None:
    """Raise ConfigError for options that are out of range or do not go together."""
    if not options.loops or min(options.loops) < 1 or min(options.sequences, options.examples) < 1:
        raise ConfigError("--loops, --sequences and --examples must be at least 1.")
    if options.sequence_length < 0:
        raise ConfigError("--sequence_length must be at least 1, or 0 for that of the training.")
    if options.tasks and options.harness:
        raise ConfigError("--tasks and --harness are two evaluations. Give one of them.")
    if options.exit_rules and options.harness:
        raise ConfigError(
            "--harness scores each T without an exit rule. Export the checkpoint (rdt convert CHECKPOINT OUT --to hf) and run "
            "lm_eval on that with --model_args loops=T,exit=RULE,exit_threshold=E, as docs/export.md shows."
        )
    if options.exit_rules and not options.tasks:
        raise ConfigError("--exit_rules are scored with --tasks. Add --tasks true, or omit --exit_rules.")
    if options.sequence_length and options.tasks:
        raise ConfigError("--tasks scores whole examples. Omit --sequence_length.")
    if options.harness and options.data is not None:
        raise ConfigError("--harness has the data of its tasks. Omit --data.")
    for name in ("harness_path", "limit", "fewshot", "batch_size"):
        if not options.harness and getattr(options, name) != getattr(EvalOptions, name):
            raise ConfigError(f"--{name} is for --harness. Add --harness TASKS, or omit --{name}.")
    if min(options.limit, options.fewshot or 0) < 0 or options.batch_size < 1:
        raise ConfigError("--limit and --fewshot must be at least 0, --batch_size at least 1.")
