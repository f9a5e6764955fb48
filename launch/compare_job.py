"""A comparison as a Slurm job array: a task for each arm, and a job after them that writes the table."""

import shlex
from pathlib import Path
from string import Template

from launch.cluster_options import choose_python, format_setup
from launch.commands.compare import Comparison, read_comparison
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
from megatron_rdt.errors import EXIT_OK, ConfigError

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
exec $python -m launch.cli compare $options --table
"""


def read_job(job: SubmitOptions) -> tuple[Comparison, list[str]]:
    """Check the options of a comparison's jobs; return the comparison and the words of `rdt compare`.

    Raises:
        ConfigError: an option cannot work.
    """
    check_job(job)
    if job.nodes != 1:
        raise ConfigError(f"--nodes is {job.nodes}, but each arm of a comparison has one node. Omit it.")
    if job.container:
        raise ConfigError("--container is for runs that srun starts, which the arms of a comparison are not. Omit it.")
    words = [
        "--config",
        job.config,
        *split_words(job.overrides, "overrides"),
        *split_words(job.compare or "", "compare"),
    ]
    comparison = read_comparison("rdt submit", words)
    for name in ("only", "table", "dry_run"):
        if getattr(comparison.options, name):
            raise ConfigError(
                f"--compare: --{name} is chosen for each job here. Omit it; rdt submit has its own --dry_run."
            )
    return comparison, words


def render_array(job: SubmitOptions, comparison: Comparison, words: list[str], template: str) -> str:
    """Return the script of the array, or of the table's job, from its template."""
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
        # The table's job trains nothing.
        options=shlex.join(word for word in words if is_array or word != "--retry"),
    )


def submit_comparison(job: SubmitOptions) -> int:
    """Submit a comparison's array and the job that writes its table; with --dry_run, print both scripts."""
    comparison, words = read_job(job)
    array, table = (render_array(job, comparison, words, text) for text in (TEMPLATE.read_text("utf-8"), TABLE_SCRIPT))
    if job.dry_run:
        print(f"{array}\n# After the array:\n{table}", end="")
        return EXIT_OK
    comparison.runner.check_settings()
    name, directory = f"{comparison.config.run.name}-compare", Path(job.directory)
    number = call_sbatch(directory / f"{name}.sbatch", array)
    after = call_sbatch(directory / f"{name}-table.sbatch", table, f"--dependency=afterany:{number}")
    print(
        f"submitted array {number}, a task for each of {len(comparison.runner.arms)} arms, and job {after} for the table"
    )
    return EXIT_OK
