"""Options of `rdt submit` that a cluster has: read from its YAML file, and turned into lines of a batch script."""

import difflib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from launch.slurm_job import SubmitOptions
from megatron_rdt.config.yaml_files import ENDINGS, SHIPPED, read_mapping
from megatron_rdt.errors import ConfigError

FOLDER = Path(SHIPPED) / "cluster"
# Of one run or one submission, so not of a cluster.
OF_A_RUN = {"config", "overrides", "compare", "sweep", "after", "cluster", "dry_run", "nodes"}
KEYS = [option.name for option in fields(SubmitOptions) if option.name not in OF_A_RUN]
LISTS = ("modules", "variables", "container_mounts")
NAME_OF_SECRET = re.compile(r"token(?!iz)|secret|password|passwd|credential|api_?key|private", re.IGNORECASE)


def find_cluster_file(cluster: str) -> Path:
    """Return the file of --cluster, itself a path or the name of one in configs/cluster."""
    if Path(cluster).suffix in ENDINGS or "/" in cluster:
        return Path(cluster)
    return next(
        (path for ending in ENDINGS if (path := FOLDER / f"{cluster}{ending}").is_file()), FOLDER / f"{cluster}.yaml"
    )


def read_cluster_words(cluster: str) -> list[str]:
    """Return the options of a cluster's file as words of a command line.

    Raises:
        ConfigError: it cannot be read, or has a key that is no option of a cluster.
    """
    file = find_cluster_file(cluster)
    words = []
    for key, value in read_mapping(str(file), "cluster file", "--cluster").items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It may have: {', '.join(KEYS)}."
            raise ConfigError(f"{file}: key {key} is no option of a cluster. {hint}")
        is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
        if not (is_list if key in LISTS else isinstance(value, str | int | float)):
            kind = "a list of texts" if key in LISTS else "a text or a number"
            raise ConfigError(
                f"{file}: {key} is {json.dumps(value, default=str)}, which is not {kind}. Fix it, or omit it."
            )
        words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def add_cluster_words(words: Sequence[str]) -> list[str]:
    """Return the words of `rdt submit` and, for options that they do not give, those of the file of --cluster."""
    found = None
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--cluster":
            found = value if equals else next(iter(words[index + 1 :]), None)
    given = {word.partition("=")[0].replace("-", "_") for word in words}
    from_file = read_cluster_words(found) if found else []
    return [*(word for word in from_file if word.partition("=")[0].replace("-", "_") not in given), *words]


def format_setup(job: SubmitOptions) -> str:
    """Return the lines of a script that load modules and set variables; ConfigError for a wrong one, or a secret."""
    lines = [f"module load {shlex.join(job.modules)}"] if job.modules else []
    for text in job.variables:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--variables: {text} is not NAME=VALUE. Write each variable so.")
        if NAME_OF_SECRET.search(name):
            raise ConfigError(
                f"--variables: {name} looks like a secret, and the script can be read. Export it in the shell that submits: "
                "sbatch passes its environment on."
            )
        lines.append(f"export {name}={shlex.quote(value)}")
    return "\n".join(lines)


def format_container(job: SubmitOptions, root: Path) -> tuple[str, str]:
    """Return options of srun and a command before Python's, both empty without a container.

    Args:
        job: the options.
        root: working directory of the job, which has the same path inside.
    """
    if not job.container:
        if job.container_mounts:
            raise ConfigError("--container_mounts is given, but no --container. Give both or none.")
        return "", ""
    for mount in job.container_mounts:
        if not re.fullmatch(r"[^:]+:[^:]+(:[^:]+)?", mount):
            raise ConfigError(
                f"--container_mounts: {mount} is not HOST:INSIDE, such as /scratch:/scratch. Write each so."
            )
    mounts = [f"{root}:{root}", *job.container_mounts]
    if job.container_runtime == "pyxis":
        options = ("image", job.container), ("mounts", ",".join(mounts)), ("workdir", root)
        return " ".join(f"--container-{name}={shlex.quote(str(value))}" for name, value in options), ""
    binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in mounts)
    gpus = "" if job.gpus_per_node == 0 else "--nv "
    return "", f"apptainer exec {gpus}{binds} --pwd {shlex.quote(str(root))} {shlex.quote(job.container)}"


def choose_python(job: SubmitOptions) -> str:
    """Return Python's program for a script: as given, else python3 in a container, else the one that runs here."""
    return shlex.quote(job.python or ("python3" if job.container else sys.executable))
