"""`rdt eval`: the validation loss of a checkpoint at several loop counts."""

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
    """Validation sequences to use, spread evenly over the split, of the length that the run was trained with."""
    data: PathText | None = None
    """Directory of a prepared corpus; by default the run's own."""
    out: PathText | None = None
    """JSON file to write; by default eval.json in the run directory, and none for a checkpoint outside a run."""


def evaluate(words: list[str]) -> int:
    """Measure the validation loss of a checkpoint at several loop counts."""
    options = parse_options("eval", summary_of(evaluate), EvalOptions, words)
    if not options.loops or min(options.loops) < 1 or options.sequences < 1:
        raise ConfigError("--loops and --sequences must be at least 1.")
    from megatron_rdt.evaluate.loss import evaluate_checkpoint

    evaluate_checkpoint(**vars(options))
    return EXIT_OK
