"""A comparison as a Slurm job array: a task for each arm, and a job after them that writes the table."""

import shlex
from pathlib import Path
from string import Template

from launch.cluster_options import choose_python, format_setup
from launch.commands.compare import Comparison, read_comparison
from launch.job_snapshot import SUBMITTED, make_snapshot, read_code
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
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.terminal import show_line

TEMPLATE = TEMPLATES / "compare_array.sbatch"
TABLE_SCRIPT = """#!/bin/bash
#SBATCH --job-name=$name-table
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --open-mode=append
#SBATCH --output=$output
$extra
cd $root || exit 1
$setup
submitted=$submitted
export PYTHONPATH="$$submitted/code"
exec $python -P -m launch.cli compare --config "$$submitted/config.yaml"$options --table
"""


def read_job(job: SubmitOptions) -> tuple[Comparison, list[str]]:
    """Check the options of a comparison's jobs; return the comparison and the words of --compare.

    Raises:
        ConfigError: an option cannot work.
    """
    check_job(job)
    if job.nodes != 1:
        raise ConfigError(f"--nodes is {job.nodes}, but each arm of a comparison has one node. Omit it.")
    if job.container:
        raise ConfigError("--container is for runs that srun starts, which the arms of a comparison are not. Omit it.")
    words = split_words(job.compare or "", "compare")
    of_run = ["--config", job.config, *split_words(job.overrides, "overrides")]
    comparison = read_comparison("rdt submit", [*of_run, *words])
    for name in ("only", "table", "dry_run"):
        if getattr(comparison.options, name):
            raise ConfigError(
                f"--compare: --{name} is chosen for each job here. Omit it; rdt submit has its own --dry_run."
            )
    return comparison, words


def render_array(
    job: SubmitOptions, comparison: Comparison, words: list[str], template: str, submitted: Path = Path(SUBMITTED)
) -> str:
    """Return the script of the array, or of the table's job, from its template; `submitted` is the snapshot's directory."""
    config, runner = comparison.config, comparison.runner
    is_array = "--array" in template
    return Template(template).substitute(
        name=quote_directive("run.name", f"{config.run.name}-compare"),
        last=len(runner.arms) - 1,
        cpus=job.cpus_per_process * job.processes_per_node,
        time=job.time,
        signal=job.signal_before_s,
        output=format_output_directive(job, "%x-%A_%a.out" if is_array else "%x-%j.out"),
        extra=format_extra_directives(job, choose_gpus_per_node(job, config)),
        root=shlex.quote(str(Path.cwd())),
        arms=" ".join(shlex.quote(arm.name) for arm in runner.arms),
        directory=shlex.quote(str(runner.directory)),
        setup=format_setup(job),
        python=choose_python(job),
        submitted=shlex.quote(str(submitted)),
        # The table's job trains nothing.
        options="".join(f" {shlex.quote(word)}" for word in words if is_array or word != "--retry"),
    )


def submit_comparison(job: SubmitOptions) -> int:
    """Submit a comparison's array and the job that writes its table; with --dry_run, print both scripts."""
    comparison, words = read_job(job)
    snapshot = make_snapshot(comparison.config, read_code(), comparison.runner.directory)
    templates = TEMPLATE.read_text("utf-8"), TABLE_SCRIPT
    array, table = (render_array(job, comparison, words, text, snapshot.directory) for text in templates)
    if job.dry_run:
        print(f"{array}\n# After the array:\n{table}", end="")
        return EXIT_OK
    comparison.runner.check_settings()
    # Before the first sbatch, since importing torch takes long: an array whose table is not submitted yet is not left alone.
    from megatron_rdt.compare.measure import find_final_checkpoint

    unfinished = [run for run in comparison.runner.all_runs() if find_final_checkpoint(run) is None]
    name, directory = f"{comparison.config.run.name}-compare", Path(job.directory)
    check_sbatch(directory / f"{name}.sbatch")
    snapshot.write()
    script = directory / f"{name}.sbatch"
    number = call_sbatch(script, array)
    try:
        after = call_sbatch(directory / f"{name}-table.sbatch", table, f"--dependency=afterany:{number}")
    except BaseException:
        show_line(f"array {number} is submitted, the job for the table is not; rdt compare --table writes the table")
        raise
    print(
        f"submitted array {number}, a task for each of {len(comparison.runner.arms)} arms, and job {after} for the table"
    )
    tasks = {arm.name: task for task, arm in enumerate(comparison.runner.arms)}
    for run in unfinished:
        task = f"{number}_{tasks[run.arm]}"
        try:
            record_job(run.directory, task, str(script), str(directory / f"{name}-{task}.out"))
        except OSError as error:
            show_line(f"rdt submit: warning: rdt status will not show job {task} of {run.directory}: {error.strerror}")
    return EXIT_OK
