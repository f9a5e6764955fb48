"""`rdt submit`: render the Slurm script for a config and hand it to sbatch."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from launch.options import parse_training
from megatron_rdt.errors import LaunchError
from megatron_rdt.files import write_text

TEMPLATE = Path(__file__).resolve().parent / "slurm" / "pretrain.sbatch"


@dataclass(frozen=True)
class SubmitConfig:
    """A job for Slurm."""

    config: str
    """YAML of the run."""
    nodes: int = 1
    """Nodes of the job."""
    processes_per_node: int = 8
    """Processes per node, one per device."""
    gpus_per_node: int = 8
    """GPUs to ask for on each node; 0 asks for none (CPU)."""
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
    overrides: str = ""
    """Further options of `rdt train`, in one string."""
    directory: str = "jobs"
    """Where the rendered script and the job's output go."""
    dry_run: bool = False
    """Print the script instead of submitting it."""


def render(job: SubmitConfig) -> str:
    """The batch script of a job, after checking its config for the planned number of processes."""
    words = ["--config", job.config, *shlex.split(job.overrides)]
    config, _ = parse_training("rdt submit", words, job.nodes * job.processes_per_node)
    extra = [f"#SBATCH --partition={job.partition}"] if job.partition else []
    extra += [f"#SBATCH --account={job.account}"] if job.account else []
    extra += [f"#SBATCH --gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=shlex.quote(config.run.name),
        nodes=job.nodes,
        processes=job.processes_per_node,
        cpus=job.cpus_per_process,
        time=job.time,
        signal=job.signal_before_s,
        directory=str(Path(job.directory).resolve()),
        extra="\n".join(extra),
        root=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        script=shlex.quote(str(TEMPLATE.parent.parent / "pretrain.py")),
        options=" ".join(shlex.quote(word) for word in words),
    )


def submit(job: SubmitConfig) -> int:
    """Print (dry run) or submit the job; returns the exit status."""
    text = render(job)
    if job.dry_run:
        print(text)
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on this machine. Run on a Slurm login node, or look at the script with --dry_run."
        )
    directory = Path(job.directory)
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / f"{Path(job.config).stem}.sbatch"
    write_text(script, text)
    result = subprocess.run(["sbatch", str(script)], check=False)
    if result.returncode:
        raise LaunchError(f"sbatch refused {script} with status {result.returncode}. Its message is above.")
    return 0
