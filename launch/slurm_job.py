"""Slurm jobs: the options of `rdt submit`, the lines of batch scripts, and the call of sbatch."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_rdt.config import RunConfig
from megatron_rdt.config.option_texts import MAY_BE_EMPTY
from megatron_rdt.errors import ConfigError, LaunchError
from megatron_rdt.files import PathText, write_text

# Slurm may send the signal this many seconds earlier than requested.
SIGNAL_TOLERANCE_S = 60
# The last line of a script that was submitted, before its hash: a script that was edited since is not replaced.
MARK = "# written by rdt submit; sha256 of the lines above: "
MAIL_TYPES = "BEGIN,END,FAIL,REQUEUE"
NO_LIMIT = ("0", "-1", "unlimited", "infinite")
TEMPLATES = Path(__file__).resolve().parent / "slurm"


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
    restarts: int = 3
    """Restarts in a row without a newer checkpoint, after failures and stops, before the job stays out of the queue."""
    partition: str = ""
    """Partition; empty takes the cluster's default."""
    account: str = ""
    """Account; empty takes the user's default."""
    qos: str = ""
    """Quality of service; empty takes the default."""
    mail: str = ""
    """Address that Slurm writes to when the job begins, ends, fails or is requeued; empty for none."""
    after: str | None = None
    """Begin after another job: its number (when it has ended with 0), or as Slurm writes it: afterany:41, afterok:41:42."""
    modules: list[str] = field(default_factory=list)
    """Modules that the job loads first, such as cuda/12.4."""
    variables: list[str] = field(default_factory=list)
    """Environment variables of the job, each NAME=VALUE, besides those of the shell that submits. They can be read in the script, so no secrets."""
    container: str = ""
    """Image of a container in which the processes run; empty for none."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Program that starts it: pyxis, the plugin of srun with --container-image, or apptainer exec."""
    container_mounts: list[str] = field(default_factory=list)
    """Directories that the container sees besides the working directory, each HOST:INSIDE, such as /scratch:/scratch."""
    python: str = ""
    """Python of the job; default: the one that runs rdt, or python3 in a container."""
    sweep: PathText = ""
    """Submit several runs as a job array: a file with the overrides of one run in each line, among them its own --run.name. They come after --overrides."""
    at_once: int = 0
    """Runs of a sweep that may be under way at the same time; 0: as many as there is room for."""
    preflight: str = ""
    """Options of rdt preflight, which checks the nodes before each start, in one string: "--free_disk 500"; or off for no check."""
    cluster: PathText = ""
    """YAML file of these options for a cluster, or NAME for configs/cluster/NAME.yaml. Options win over it."""
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


def split_words(text: str, option: str) -> list[str]:
    """Split the text of an option into words as a shell does; ConfigError if a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--{option} {text!r}: {error}. Quote it as for a shell.") from None


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


def check_job(job: SubmitOptions) -> None:
    """Raise ConfigError if a number is too small, or if the time limit leaves no time before its signal."""
    for name in ("nodes", "processes_per_node", "cpus_per_process", "signal_before_s"):
        if getattr(job, name) < 1:
            raise ConfigError(f"--{name} is {getattr(job, name)}, it must be at least 1.")
    for name in ("restarts", "at_once"):
        if getattr(job, name) < 0:
            raise ConfigError(f"--{name} is {getattr(job, name)}, it must be at least 0.")
    if job.compare is not None and job.sweep:
        raise ConfigError("--sweep and --compare are both arrays of several runs. Omit one.")
    limit = parse_time_limit(job.time)
    if limit is not None and limit < job.signal_before_s + SIGNAL_TOLERANCE_S:
        raise ConfigError(
            f"--time {job.time} is {limit} s, too short for a signal {job.signal_before_s} s before its end, which "
            f"Slurm may send {SIGNAL_TOLERANCE_S} s early. Raise --time, or lower --signal_before_s."
        )


def quote_directive(option: str, value: str | int) -> str:
    """Quote `value` for a #SBATCH line, which Slurm splits as a shell does; ConfigError if it has a line break."""
    if re.search(r"[\r\n]", str(value)):
        raise ConfigError(f"{option} {str(value)!r} has a line break, which a #SBATCH line cannot hold. Remove it.")
    return shlex.quote(str(value))


def format_extra_directives(job: SubmitOptions, gpus: int) -> str:
    """Return the #SBATCH lines of those options that are given, from the partition to --sbatch, and of `gpus` per node."""
    named = (
        *(("partition", job.partition), ("account", job.account), ("qos", job.qos), ("gpus-per-node", gpus)),
        *(
            ("mail-user", job.mail),
            ("mail-type", MAIL_TYPES * bool(job.mail)),
            ("dependency", format_dependency(job.after)),
        ),
    )
    extra = [f"#SBATCH --{option}={quote_directive('--' + option, value)}" for option, value in named if value]
    extra += [f"#SBATCH {quote_directive('--sbatch', word)}" for word in split_words(job.sbatch, "sbatch")]
    return "\n".join(extra)


def format_dependency(after: str | None) -> str:
    """Return the value of sbatch's --dependency for --after; empty for none."""
    if after is None:
        return ""
    if not re.fullmatch(r"\d+(_\d+)?|after(ok|any|notok|corr)?(:\d+(_\d+)?)+([,?]after\w*(:\d+(_\d+)?)+)*", after):
        raise ConfigError(f"--after {after} is no job. Give its number, or a condition and numbers: afterany:41:42.")
    return f"afterok:{after}" if after[:1].isdigit() else after


def format_output_directive(job: SubmitOptions, name: str) -> str:
    """Return the path of the job's output, whose file has the pattern `name`."""
    # Slurm replaces %x with the job's name and %j with its number, so every other % of the path is doubled.
    return quote_directive("--directory", f"{Path(job.directory).resolve()}".replace("%", "%%") + f"/{name}")


def _hash(text: str) -> str:
    """Return the hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_edited(script: Path) -> None:
    """Raise ConfigError if the file of a script is there and is not as `call_sbatch` wrote it."""
    if not os.path.lexists(script):
        return
    text, _, digest = script.read_text(encoding="utf-8", errors="replace").rpartition(MARK)
    if digest.strip() != _hash(text):
        raise ConfigError(
            f"{script} was edited, or is not by rdt submit, which would replace it. Submit it as it is with "
            f"sbatch {shlex.quote(str(script))}, or rename it, or choose another --directory."
        )


def check_sbatch(script: Path) -> None:
    """Raise ConfigError if the script is there and was edited, or is another's; LaunchError if there is no sbatch here."""
    _refuse_edited(script)
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on this machine. Run on a Slurm login node, or look at the script with --dry_run."
        )


def call_sbatch(script: Path, text: str, *options: str) -> str:
    """Write a batch script, submit it and return the job's number.

    Raises:
        ConfigError: the script is there and was edited, or is another's.
        LaunchError: there is no sbatch here, or it refused the script.
    """
    check_sbatch(script)
    script.parent.mkdir(parents=True, exist_ok=True)
    write_text(script, f"{text}{MARK}{_hash(text)}\n")
    command = ["sbatch", "--parsable", *options, str(script)]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise LaunchError(f"sbatch refused {script} with status {result.returncode}. Its message is above.")
    return result.stdout.strip().split(";")[0]
