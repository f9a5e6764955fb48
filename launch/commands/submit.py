"""`rdt submit`: fill in the Slurm script for a run and pass it to sbatch."""

import glob
import os
import shlex
import sys
from pathlib import Path
from string import Template

from launch.command_options import parse_options, summary_of
from launch.compare_job import submit_comparison
from launch.run_status import record_job
from launch.slurm_job import (
    TEMPLATES,
    SubmitOptions,
    call_sbatch,
    check_job,
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

TRAINING_SCRIPT = Path(__file__).resolve().parent.parent / "pretrain.py"


def read_run_config(job: SubmitOptions) -> tuple[RunConfig, list[str], str | None]:
    """Read and check the run's config and the job's options; return config, script options and path of --resume.

    Returns:
        The config, the training script's options without --resume PATH, and that path: the run's origin.

    Raises:
        ConfigError: the run's config is wrong, or the job's options do not fit it or each other.
    """
    check_job(job)
    words = ["--config", job.config, *split_words(job.overrides, "overrides")]
    config, options = parse_worker("rdt submit", words, job.nodes * job.processes_per_node)
    origin = None
    if options.resume not in RESUME_WORDS:
        origin, words = options.resume, _without_option(words, "--resume")
        check_origin(origin, run_directory_of(config), "--resume")
    elif options.init != "none":
        check_origin(options.init, run_directory_of(config), "--init")
    _check_gpus(job, config)
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


def render_script(job: SubmitOptions, config: RunConfig, words: list[str], origin: str | None) -> str:
    """Return the batch script of a job whose config and options have been checked."""
    began = shlex.quote(str(run_directory_of(config) / ORIGIN))
    return Template((TEMPLATES / "pretrain.sbatch").read_text(encoding="utf-8")).substitute(
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
        run=shlex.quote(str(run_directory_of(config))),
        restarts=job.restarts,
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
    output = directory / f"{config.run.name}-{number}.out"
    record_job(run_directory_of(config), number, str(script), str(output))
    print(f"submitted job {number}: script {script}, output {output}")
    return EXIT_OK
