"""`rdt submit`: fill in the Slurm script for a run and pass it to sbatch."""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from launch.command_options import parse_options, summary_of
from launch.train_options import RESUME_WORDS, check_paths, parse_worker
from megatron_rdt.config import RunConfig
from megatron_rdt.config.option_texts import MAY_BE_EMPTY
from megatron_rdt.errors import EXIT_OK, ConfigError, LaunchError
from megatron_rdt.files import PathText, write_text
from megatron_rdt.run_directory import CHECKPOINTS, LATEST, ORIGIN, run_directory_of

TEMPLATE = Path(__file__).resolve().parent.parent / "slurm" / "pretrain.sbatch"
TRAINING_SCRIPT = Path(__file__).resolve().parent.parent / "pretrain.py"
# Slurm may send the signal this many seconds earlier than requested.
SIGNAL_TOLERANCE_S = 60
# Consecutive restarts without a new checkpoint after which a job does not go back into the queue.
IDLE_RESTARTS = 3
NO_LIMIT = ("0", "-1", "unlimited", "infinite")


@dataclass(frozen=True)
class SubmitOptions:
    """Options of `rdt submit`."""

    config: PathText
    """YAML of the run."""
    nodes: int = 1
    """Nodes of the job."""
    processes_per_node: int = 8
    """Processes per node, one per device."""
    gpus_per_node: int | None = None
    """GPUs to ask for on each node; default one per process, none for a run with train.device cpu. 0 asks for none."""
    cpus_per_process: int = 8
    """Cores per process."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it."""
    signal_before_s: int = 300
    """Seconds before the time limit at which the run is told to save and stop."""
    partition: str = ""
    """Partition; empty takes the cluster's default."""
    account: str = ""
    """Account; empty takes the user's default."""
    sbatch: str = ""
    """More options of sbatch, in one string: "--qos=high --mem=0"."""
    overrides: str = ""
    """More options of `rdt train`, in one string. --resume PATH and --init PATH are for the first start; later ones continue the run."""
    compare: str | None = field(default=None, metadata={MAY_BE_EMPTY: True})
    """Submit a comparison of arms instead of one run: options of `rdt compare`, in one string, such as "--seeds 3", or "" for its defaults. Each arm is a task of a job array with one node, and a last job writes the table."""
    directory: PathText = "jobs"
    """Directory for the script and the job's output."""
    dry_run: bool = False
    """Print the script instead of submitting it."""


def read_run_config(job: SubmitOptions) -> tuple[RunConfig, list[str], str | None]:
    """Read and check the run's config and the job's options; return config, script options and path of --resume.

    Returns:
        The config, the training script's options without --resume PATH, and that path: the run's origin.

    Raises:
        ConfigError: the run's config is wrong, or the job's options do not fit it or each other.
    """
    for name in ("nodes", "processes_per_node", "cpus_per_process", "signal_before_s"):
        if getattr(job, name) < 1:
            raise ConfigError(f"--{name} is {getattr(job, name)}, it must be at least 1.")
    words = ["--config", job.config, *split_words(job.overrides, "overrides")]
    config, options = parse_worker("rdt submit", words, job.nodes * job.processes_per_node)
    origin = None
    if options.resume not in RESUME_WORDS:
        origin, words = options.resume, _without_option(words, "--resume")
        check_origin(origin, run_directory_of(config), "--resume")
    elif options.init != "none":
        check_origin(options.init, run_directory_of(config), "--init")
    _check_gpus(job, config)
    limit = parse_time_limit(job.time)
    if limit is not None and limit < job.signal_before_s + SIGNAL_TOLERANCE_S:
        raise ConfigError(
            f"--time {job.time} is {limit} s, too short for a signal {job.signal_before_s} s before its end, which "
            f"Slurm may send {SIGNAL_TOLERANCE_S} s early. Raise --time, or lower --signal_before_s."
        )
    return config, words, origin


def _without_option(words: list[str], option: str) -> list[str]:
    """Return the words without an option and its value, wherever it is given."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == option:
            next(rest)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def check_origin(origin: str, run_directory: Path, option: str) -> None:
    """Raise ConfigError if `origin` has no checkpoint or is of the run itself, or the run has begun without it.

    Args:
        origin: the path.
        run_directory: of the run to submit.
        option: "--resume", or "--init", for which a run may begin from an export too.

    Raises:
        ConfigError: `origin` holds no checkpoint, or the run has begun already, from elsewhere.
    """
    path = os.path.abspath(origin)
    path = os.path.dirname(path) if os.path.basename(path) == LATEST and os.path.isfile(path) else path
    has_begun = (run_directory / ORIGIN).is_file()
    began_from_it = has_begun and _is_recorded(run_directory / ORIGIN, path, option)
    if began_from_it and option == "--init":
        return  # a run that has begun needs it no more, once it has saved
    files = ("manifest.json",) if option == "--resume" else ("manifest.json", "model.safetensors")
    if not any(os.path.isfile(os.path.join(path, name)) for name in files) and not glob.glob(
        f"{glob.escape(path)}/{CHECKPOINTS}/step-*"
    ):
        raise ConfigError(f"{option} {origin} is no checkpoint, nor a run that has one. Name another in --overrides.")
    own, target = run_directory.resolve(), Path(path).resolve()
    if target == own or (run_directory / CHECKPOINTS).resolve() in (target, target.parent):
        raise ConfigError(
            f"{option} {origin} is a checkpoint of the run itself, to which the job would go back each time it starts. "
            f"Name a new run with --run.name, or omit {option} to continue the run from its newest checkpoint."
        )
    begun = [name for name in (LATEST, CHECKPOINTS, "metrics.jsonl") if (run_directory / name).exists()]
    if has_begun:
        begun = [] if began_from_it else [ORIGIN]
    if begun:
        raise ConfigError(
            f"{run_directory} holds {begun[0]} of a run that did not begin from {origin}. Choose another --run.name in "
            f"--overrides, or omit {option} to continue that run."
        )


def _is_recorded(file: Path, path: str, option: str) -> bool:
    """Return True if an origin.json says that its run began from a checkpoint or from a checkpoint of a run, by `option`."""
    record = json.loads(file.read_text(encoding="utf-8"))
    began_from, is_init = record["checkpoint"], record.get("weights_only", False)
    is_below = began_from == path or began_from.startswith(os.path.join(path, CHECKPOINTS, ""))
    return is_below and is_init == (option == "--init")


def split_words(text: str, option: str) -> list[str]:
    """Split the text of an option into words as a shell does; ConfigError if a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--{option} {text!r}: {error}. Quote it as for a shell.") from None


def _check_gpus(job: SubmitOptions, config: RunConfig) -> None:
    """Raise ConfigError unless a node has no GPU or one per process, as train.device demands."""
    gpus = choose_gpus_per_node(job, config)
    if gpus not in (0, job.processes_per_node):
        raise ConfigError(
            f"--gpus_per_node {gpus} and --processes_per_node {job.processes_per_node} differ, but each process drives "
            "one GPU. Give both the same number, or 0 GPUs for a run on CPU."
        )
    if (gpus == 0) != (config.train.device == "cpu") and config.train.device != "auto":
        raise ConfigError(
            f"train.device is {config.train.device}, but --gpus_per_node is {gpus}. Omit --gpus_per_node, or "
            'change the device with --overrides "--train.device ...".'
        )


def choose_gpus_per_node(job: SubmitOptions, config: RunConfig) -> int:
    """Return the GPUs to request on each node: as given, else none for train.device cpu, else one per process."""
    if job.gpus_per_node is not None:
        return job.gpus_per_node
    return 0 if config.train.device == "cpu" else job.processes_per_node


def parse_time_limit(text: str) -> int | None:
    """Return the seconds of a time limit in any of Slurm's formats, or None for no limit.

    The formats are minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    if text.lower() in NO_LIMIT:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--time {text} is not a time limit. Write hours:minutes:seconds or days-hours:minutes.")
    days, *parts = (int(part) if part else 0 for part in match.groups())
    # Two numbers without days are minutes:seconds to Slurm, one is minutes; in all other formats hours come first.
    minutes_first = match[1] is None and match[4] is None
    hours, minutes, seconds = (0, *parts[:2]) if minutes_first else parts
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def quote_directive(option: str, value: str | int) -> str:
    """Quote `value` for a #SBATCH line, which Slurm splits as a shell does; ConfigError if it has a line break."""
    if re.search(r"[\r\n]", str(value)):
        raise ConfigError(f"{option} {str(value)!r} has a line break, which a #SBATCH line cannot hold. Remove it.")
    return shlex.quote(str(value))


def format_extra_directives(job: SubmitOptions, gpus: int) -> str:
    """Return the #SBATCH lines of partition, account, `gpus` per node and --sbatch, those that are given."""
    named = (("partition", job.partition), ("account", job.account), ("gpus-per-node", gpus))
    extra = [f"#SBATCH --{option}={quote_directive('--' + option, value)}" for option, value in named if value]
    extra += [f"#SBATCH {quote_directive('--sbatch', word)}" for word in split_words(job.sbatch, "sbatch")]
    return "\n".join(extra)


def format_output_directive(job: SubmitOptions, name: str) -> str:
    """Return the path of the job's output, whose file has the pattern `name`."""
    # Slurm replaces %x with the job's name and %j with its number, so every other % of the path is doubled.
    return quote_directive("--directory", f"{Path(job.directory).resolve()}".replace("%", "%%") + f"/{name}")


def render_script(job: SubmitOptions, config: RunConfig, words: list[str], origin: str | None) -> str:
    """Return the batch script of a job whose config and options have been checked."""
    began = shlex.quote(str(run_directory_of(config) / ORIGIN))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=quote_directive("run.name", config.run.name),
        nodes=job.nodes,
        processes=job.processes_per_node,
        cpus=job.cpus_per_process,
        time=job.time,
        signal=job.signal_before_s,
        output=format_output_directive(job, "%x-%j.out"),
        extra=format_extra_directives(job, choose_gpus_per_node(job, config)),
        root=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        script=shlex.quote(str(TRAINING_SCRIPT)),
        latest=shlex.quote(str(run_directory_of(config) / LATEST)),
        stalled=shlex.quote(str(Path(job.directory).resolve() / config.run.name)),
        restarts=IDLE_RESTARTS,
        options=shlex.join(words),
        # The file is written before the first step: from then on the job continues its own run.
        choose=f"if [ -e {began} ]; then resume=auto; else resume={shlex.quote(origin)}; fi" if origin else "",
        resume='"$resume"' if origin else "auto",
    )


def submit(words: list[str]) -> int:
    """Submit a run to Slurm."""
    # Here --config is an option like the others, the run's YAML, and it is required.
    job = parse_options("submit", summary_of(submit), SubmitOptions, words, positional=False)
    if job.compare is not None:
        from launch.compare_job import submit_comparison

        return submit_comparison(job)
    config, run_words, origin = read_run_config(job)
    text = render_script(job, config, run_words, origin)
    if job.dry_run:
        print(text, end="")
        return EXIT_OK
    # The job would find out too, but only after its time in the queue.
    check_paths(config)
    directory = Path(job.directory)
    script = directory / f"{config.run.name}.sbatch"
    number = call_sbatch(script, text)
    print(f"submitted job {number}: script {script}, output {directory / f'{config.run.name}-{number}.out'}")
    return EXIT_OK


def call_sbatch(script: Path, text: str, *options: str) -> str:
    """Write a batch script, submit it and return the job's number.

    Raises:
        LaunchError: there is no sbatch here, or it refused the script.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on this machine. Run on a Slurm login node, or look at the script with --dry_run."
        )
    script.parent.mkdir(parents=True, exist_ok=True)
    write_text(script, text)
    command = ["sbatch", "--parsable", *options, str(script)]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise LaunchError(f"sbatch refused {script} with status {result.returncode}. Its message is above.")
    return result.stdout.strip().split(";")[0]
