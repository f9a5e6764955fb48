"""`rdt submit`: fill in the Slurm script for a run and pass it to sbatch."""

import glob
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from launch.cluster_options import add_cluster_words, choose_python, format_container, format_setup
from launch.command_options import parse_options, summary_of
from launch.commands.preflight import PreflightOptions
from launch.compare_job import submit_comparison
from launch.job_snapshot import SUBMITTED, Snapshot, make_snapshot, read_code
from launch.run_status import record_job
from launch.slurm_job import (
    TEMPLATES,
    SubmitOptions,
    call_sbatch,
    check_job,
    check_sbatch,
    choose_gpus_per_node,
    format_extra_directives,
    format_output_directive,
    quote_directive,
    split_words,
)
from launch.train_options import RESUME_WORDS, check_paths, parse_worker
from megatron_rdt.config import RunConfig
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.run_directory import CHECKPOINTS, LATEST, ORIGIN, run_directory_of
from megatron_rdt.untrusted_files import read_json


@dataclass(frozen=True)
class JobRun:
    """A run that a job, or a task of an array, will do.

    Attributes:
        config: resolved and checked.
        origin: path of --resume for its first start; None where every start continues the run or begins it.
        init: value of --init, "none" for random weights.
    """

    config: RunConfig
    origin: str | None
    init: str

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return run_directory_of(self.config)


def read_run(job: SubmitOptions, overrides: str = "") -> JobRun:
    """Read and check a run's config and the job's options.

    Args:
        job: the options.
        overrides: more options of the run, after those of the job.

    Raises:
        ConfigError: the run's config is wrong, or the job's options do not fit it or each other.
    """
    check_job(job)
    words = ["--config", job.config, *split_words(job.overrides, "overrides"), *split_words(overrides, "sweep")]
    config, options = parse_worker("rdt submit", words, job.nodes * job.processes_per_node)
    origin = None
    if options.resume not in RESUME_WORDS:
        origin = options.resume
        check_origin(origin, run_directory_of(config), "--resume")
    elif options.init != "none":
        check_origin(options.init, run_directory_of(config), "--init")
    _check_gpus(job, config)
    return JobRun(config, origin, options.init)


def read_runs(job: SubmitOptions) -> list[JobRun]:
    """Return the run of a job, or those of a sweep in the order of their lines.

    Raises:
        ConfigError: see `read_run`; the message names the line of a sweep's file.
    """
    if not job.sweep:
        return [read_run(job)]
    try:
        text = Path(job.sweep).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"--sweep {job.sweep} cannot be read: {reason}. Name a file with the options of a run per line."
        ) from None
    runs: dict[str, JobRun] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            run = read_run(job, line)
        except ConfigError as error:
            raise ConfigError(f"{job.sweep}, line {number}: {error}") from None
        if run.origin is not None:
            raise ConfigError(
                f"{job.sweep}, line {number}: a sweep has no --resume PATH. Use --init, or submit the run alone."
            )
        if run.config.run.name in runs:
            raise ConfigError(
                f"{job.sweep}, line {number}: a run before is called {run.config.run.name} too. Give each line a --run.name."
            )
        runs[run.config.run.name] = run
    if not runs:
        raise ConfigError(f"--sweep {job.sweep} has no line with the options of a run. Write one per run.")
    if len({run.init for run in runs.values()}) > 1:
        raise ConfigError(
            f"--sweep {job.sweep}: the runs differ in --init, which is the same for all. Put it into --overrides."
        )
    return list(runs.values())


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
    try:
        record = read_json(file)
        began_from, is_init = os.fspath(record["checkpoint"]), bool(record.get("weights_only", False))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file}, which says where the run began, cannot be read ({error!r}). Put it back, or choose another --run.name "
            "in --overrides."
        ) from None
    is_below = began_from == path or began_from.startswith(os.path.join(path, CHECKPOINTS, ""))
    return is_below and is_init == (option == "--init")


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


PREFLIGHT = """\
# A process on each node first looks at its devices, disk, clock and network; a node that is unfit is named, and the next start
# is without it.
rm -f "$run/unfit"
PYTHONPATH="$submitted/code" srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \\
    --cpus-per-task="$SLURM_CPUS_PER_TASK"{srun_options} {python} -P -m launch.cli preflight --folder "$run" \\
    --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" --unfit "$run/unfit"{options} &
wait_for_step
if [ "$status" -ne 0 ]; then
    echo "preflight ended with status $status (restart $restart)"
    requeue_or_exit "$status"
fi
"""


def format_preflight(job: SubmitOptions, srun_options: str, python: str) -> str:
    """Return the lines of a script that check the nodes; none with --preflight off."""
    if job.preflight == "off":
        return ""
    words = split_words(job.preflight, "preflight")
    parse_options("preflight", "", PreflightOptions, words)
    options = f" {shlex.join(words)}" if words else ""
    return PREFLIGHT.format(srun_options=srun_options, python=python, options=options)


def render_script(job: SubmitOptions, name: str, runs: Sequence[JobRun], snapshots: Sequence[Snapshot]) -> str:
    """Return the batch script of a job called `name` whose runs have been checked: several are the tasks of an array."""
    first = runs[0]
    is_array = bool(job.sweep)
    began = '"$run"/' + ORIGIN
    directories = [shlex.quote(str(run.directory)) for run in runs]
    names = [shlex.quote(snapshot.directory.name) for snapshot in snapshots]
    if is_array:
        task = "$SLURM_ARRAY_TASK_ID"
        choose = f"runs=({' '.join(directories)})\nsubmissions=({' '.join(names)})\nrun=${{runs[{task}]}}\n"
        choose += f'submitted="$run/{SUBMITTED}/${{submissions[{task}]}}"'
    else:
        choose = f'run={directories[0]}\nsubmitted="$run/{SUBMITTED}/{names[0]}"'
    origin = shlex.quote(first.origin or "")
    srun_options, before_python = format_container(job, Path.cwd())
    srun_options, python = f" {srun_options}" * bool(srun_options), f"{before_python} {choose_python(job)}".strip()
    array = f"#SBATCH --array=0-{len(runs) - 1}{f'%{job.at_once}' * bool(job.at_once)}\n" * is_array
    return Template((TEMPLATES / "pretrain.sbatch").read_text(encoding="utf-8")).substitute(
        name=quote_directive("run.name", name),
        nodes=job.nodes,
        processes=job.processes_per_node,
        cpus=job.cpus_per_process,
        time=job.time,
        signal=job.signal_before_s,
        output=format_output_directive(job, "%x-%A_%a.out" if is_array else "%x-%j.out"),
        extra=array + format_extra_directives(job, choose_gpus_per_node(job, first.config)),
        root=shlex.quote(str(Path.cwd())),
        setup=format_setup(job),
        choose_run=choose,
        preflight=format_preflight(job, srun_options, python),
        srun_options=srun_options,
        python=python,
        restarts=job.restarts,
        options=f" --init {shlex.quote(first.init)}" * (first.init != "none"),
        # The file is written before the first step: from then on the job continues its own run.
        choose_resume=f"if [ -e {began} ]; then resume=auto; else resume={origin}; fi" if first.origin else "",
        resume='"$resume"' if first.origin else "auto",
    )


def submit(words: list[str]) -> int:
    """Submit a run to Slurm, or several as an array; a comparison, too."""
    # Here --config is an option like the others, the run's YAML, and it is required.
    words = add_cluster_words(words)
    job = parse_options("submit", summary_of(submit), SubmitOptions, words, positional=False)
    if job.compare is not None:
        return submit_comparison(job)
    runs, code = read_runs(job), read_code()
    snapshots = [make_snapshot(run.config, code) for run in runs]
    name = f"{Path(job.sweep).stem}-sweep" if job.sweep else runs[0].config.run.name
    text = render_script(job, name, runs, snapshots)
    if job.dry_run:
        print(text, end="")
        return EXIT_OK
    # The job would find out too, but only after its time in the queue.
    for run in runs:
        check_paths(run.config)
    directory = Path(job.directory)
    script = directory / f"{name}.sbatch"
    check_sbatch(script)
    for snapshot in snapshots:
        snapshot.write()
    number = call_sbatch(script, text)
    for task, run in enumerate(runs):
        output = directory / (f"{name}-{number}_{task}.out" if job.sweep else f"{name}-{number}.out")
        record_job(run.directory, f"{number}_{task}" if job.sweep else number, str(script), str(output))
    if job.sweep:
        print(
            f"submitted array {number} of {len(runs)} runs: script {script}, output {directory / f'{name}-{number}_*.out'}"
        )
    else:
        print(f"submitted job {number}: script {script}, output {output}")
    return EXIT_OK
