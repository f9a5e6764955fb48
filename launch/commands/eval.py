"""`rdt eval`: the validation loss of a checkpoint at several loop counts, or its accuracy on tasks."""

from dataclasses import dataclass, field

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText


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
    """Tokens of a validation sequence; 0: as many as in training, which of an imported model may be more than memory or the split can hold."""
    data: PathText | None = None
    """Directory of a prepared corpus; by default the run's own."""
    out: PathText | None = None
    """JSON file to write; by default eval.json (with --tasks eval-tasks.json) in the run directory, and none for a checkpoint outside a run."""
    tasks: bool = False
    """Instead of the loss, score the answers to the validation split's examples of tasks: exact match by difficulty and T."""
    examples: int = 200
    """tasks: largest number of examples of each task and difficulty."""
    exit_rules: list[str] = field(default_factory=list)
    """tasks: exit rules to score as well, at most the largest T, such as change:0.01,kl:1e-4 or kl_entropy:0.01:entropy=3:hits=2."""


def evaluate(words: list[str]) -> int:
    """Measure the validation loss of a checkpoint, or its accuracy on tasks, at several loop counts."""
    options = parse_options("eval", summary_of(evaluate), EvalOptions, words)
    if not options.loops or min(options.loops) < 1 or min(options.sequences, options.examples) < 1:
        raise ConfigError("--loops, --sequences and --examples must be at least 1.")
    if options.exit_rules and not options.tasks:
        raise ConfigError("--exit_rules are scored with --tasks. Add --tasks true, or omit --exit_rules.")
    if options.sequence_length < 0:
        raise ConfigError("--sequence_length must be at least 1, or 0 for that of the training.")
    if options.sequence_length and options.tasks:
        raise ConfigError("--tasks scores whole examples. Omit --sequence_length.")
    common = (options.checkpoint, options.loops)
    if options.tasks:
        from megatron_rdt.evaluate.task_evaluation import evaluate_tasks

        evaluate_tasks(*common, options.examples, options.data, options.out, options.exit_rules)
    else:
        from megatron_rdt.evaluate.loss import evaluate_checkpoint

        evaluate_checkpoint(*common, options.sequences, options.data, options.out, options.sequence_length)
    return EXIT_OK
