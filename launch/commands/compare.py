"""`rdt compare`: train matched arms of one config, and write one table and one page about them."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from launch.arm_options import ArmOptions
from launch.command_options import parse_run_options, split_entries, split_repeated
from launch.local_processes import count_processes
from megatron_rdt.config import RunConfig, check_config, dump_config, load_config
from megatron_rdt.config.yaml_files import UniqueKeys
from megatron_rdt.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, ConfigError, DataError
from megatron_rdt.files import write_text

if TYPE_CHECKING:
    from launch.arm_runner import ArmRunner

DESCRIPTION = "Train matched arms of one config on the same examples, and compare them in one table."
DEFAULT_ARMS = ["looped", "unlooped", "untied"]
SWEEP_SHARE = 10  # of a run's steps, one in so many are taken to choose a learning rate


@dataclass(frozen=True)
class CompareOptions(ArmOptions):
    """Options of `rdt compare` besides the run's config, which may hold any option of `rdt train`."""

    arms: str = field(default="", metadata={"metavar": "A,B,..."})
    """Built-in arms, the first being the reference. looped: as given; unlooped: one pass, equal weights; untied: one pass through as many distinct core layers as the loop runs on average, equal FLOPs; fixed, drawn: T; full, truncated: backpropagation. Default: looped,unlooped,untied, or looped where there is an axis."""
    axis: str = field(default="", metadata={"metavar": "FIELD=A,B,..."})
    """A field and its values, such as model.injection=diagonal,add; may be given several times, for every combination. Made from these values, every arm of --arms is trained."""
    seeds: int = 1
    """Replicates, of the seeds run.seed, run.seed + 1, ...; all arms of a replicate have its seed, and with it the same examples in the same order."""
    lr_sweep: str = field(default="", metadata={"metavar": "R,R,..."})
    """Learning rates from which each arm takes the best, by the validation loss of short runs with the first seed."""
    sweep_steps: int = 0
    """Optimizer steps of each short run; 0: a tenth of the run's."""
    examples: int = 200
    """Validation examples of each task and difficulty to measure accuracy on, where the corpus holds tasks."""
    only: str = field(default="", metadata={"metavar": "ARM,..."})
    """Train and measure only these arms now, and write no table: one task of a job array, for instance."""
    table: bool = False
    """Train nothing: measure the runs that are finished, and write the table."""


class Comparison(NamedTuple):
    """A comparison as it was asked for: its options, its runs, the arms to train now, sentences for the table."""

    config: RunConfig
    options: CompareOptions
    runner: "ArmRunner"
    only: list[str]
    notes: list[str]


def read_comparison(program: str, words: list[str]) -> Comparison:
    """Parse the words of a comparison, build its arms and check the config of every run.

    Raises:
        ConfigError: an option is wrong, or an arm cannot be trained.
        DataError: there are no shards.
    """
    earlier, words = split_repeated(words, "axis")
    config, options = parse_run_options(program, DESCRIPTION, CompareOptions, words)
    texts = [text for text in (*earlier, options.axis) if text]
    check_config(config)
    named, only, rates = _check_options(options)
    axes = read_axes(config, texts)
    processes = options.nproc or count_processes(config)
    from launch.arm_runner import ArmRunner
    from megatron_rdt.compare.arms import build_arms, check_arms, find_changed_examples

    arms, notes = build_arms(config, named or (["looped"] if axes else DEFAULT_ARMS), axes)
    check_arms(config, arms, processes)
    changed = find_changed_examples(axes)
    if changed:
        notes.append(f"along {', '.join(changed)} the arms do not train on the same examples, or not on as many")
    names = [arm.name for arm in arms]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: there is no arm {name}. The arms are {', '.join(names)}.")
    directory = Path(config.run.root) / f"{config.run.name}-compare"
    sweep_steps = options.sweep_steps or max(config.train.steps // SWEEP_SHARE, 1)
    runner = ArmRunner(
        config, arms, directory, options.seeds, options.sequences, processes, rates, sweep_steps, options.examples
    )
    runner.check_configs()
    return Comparison(config, options, runner, only, notes)


def compare(words: list[str]) -> int:
    """Train matched arms, such as looped against untied, and compare them."""
    _, options, runner, only, notes = read_comparison("rdt compare", words)
    if options.dry_run:
        runner.print_plan(notes, options.at_once, only)
        return EXIT_OK
    if options.table and not runner.has_trained():
        raise DataError(
            f"no run of {runner.directory} is finished or has failed, so there is no table. Train first: the same command "
            "without --table."
        )
    runner.check_settings()
    chosen = only or [arm.name for arm in runner.arms]
    with runner.lock(chosen):
        is_trained = options.table or runner.train(chosen, options.at_once, options.retry)
        if not is_trained or not runner.measure(chosen, options.at_once):
            print(f"stopped; the same command goes on, {runner.directory}")
            return EXIT_PREEMPTED
        if only:
            print(f"{', '.join(chosen)}: done; the same command without --only, or with --table, writes the table")
            return EXIT_OK
        return EXIT_FAILED if runner.write_table(notes) else EXIT_OK


def _check_options(options: CompareOptions) -> tuple[list[str], list[str], list[float]]:
    """Check the options; return the names of --arms and --only, and the rates of --lr_sweep.

    Raises:
        ConfigError: a number is too small, an entry is given twice, or options exclude each other.
    """
    options.check()
    for name, least in (("seeds", 1), ("sweep_steps", 0), ("examples", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} is {getattr(options, name)}, it must be at least {least}.")
    named, only = split_entries(options.arms, "arms"), split_entries(options.only, "only")
    try:
        rates = [float(part) for part in split_entries(options.lr_sweep, "lr_sweep")]
    except ValueError:
        raise ConfigError(f"--lr_sweep {options.lr_sweep} must be numbers, such as 1e-3,3e-3.") from None
    if any(not 0 < rate < math.inf for rate in rates):
        raise ConfigError(f"--lr_sweep {options.lr_sweep} must be rates above 0.")
    for name, values in (("arms", named), ("only", only), ("lr_sweep", rates)):
        if len(set(values)) < len(values):
            raise ConfigError(f"--{name} {getattr(options, name)} names something twice. Remove one.")
    if options.table and only:
        raise ConfigError("--table writes the table of all arms, --only is for some of them. Omit either.")
    for name in ("retry", "dry_run"):
        if options.table and getattr(options, name):
            raise ConfigError(
                f"--table writes the table of the runs that there are, --{name} is about training. Omit either."
            )
    if options.sweep_steps and not rates:
        raise ConfigError(
            f"--sweep_steps {options.sweep_steps} is the length of a sweep's runs. Give --lr_sweep, or omit it."
        )
    return named, only, rates


def read_axes(config: RunConfig, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each axis, by dotted name, as the config would hold them.

    Args:
        config: gives fields that an axis does not name.
        texts: such as "model.injection=diagonal,add"; a value that is a list has brackets.

    Raises:
        ConfigError: there is no such field, a value is not one of it, or an axis is given twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        key = key.strip().replace("-", "_").removeprefix("__")
        if not equals or not listed.strip():
            raise ConfigError(f"--axis {text} needs a field and its values, such as model.injection=diagonal,add.")
        if key.startswith("run."):
            raise ConfigError(f"--axis {key}: the runs of a comparison have names and seeds of their own. Use --seeds.")
        if key in axes:
            raise ConfigError(f"--axis {key} is given twice. Give all of its values in one.")
        try:
            values = yaml.load(f"[{listed}]", UniqueKeys)
        except yaml.YAMLError:
            raise ConfigError(f"--axis {text} is not a list of values. Separate them by commas.") from None
        typed = [_read_value(config, key, value) for value in values]
        if len({repr(value) for value in typed}) < len(typed):
            raise ConfigError(f"--axis {text} lists a value twice. Remove one.")
        axes[key] = typed
    return axes


def _read_value(config: RunConfig, key: str, value: Any) -> Any:
    """Return the value that a field of the config has once it is set to `value`, as on a command line."""
    section, _, name = key.partition(".")
    with tempfile.TemporaryDirectory(prefix="rdt-compare-") as folder:
        file = Path(folder) / "config.yaml"
        write_text(file, dump_config(config))
        word = value if isinstance(value, str) else json.dumps(value)
        changed = load_config(file, [f"--{key}={word}"])
    return getattr(getattr(changed, section), name)
