"""Refusal of a command that a launcher started several times: each process would write the same files."""

from collections.abc import Sequence

from megatron_rdt.environment import read_process_info
from megatron_rdt.errors import ConfigError

LAUNCHERS = {"torch": "torchrun or deepspeed", "slurm": "srun"}
VARIABLES = {"torch": "RANK and WORLD_SIZE", "slurm": "SLURM_PROCID"}
# Commands that write no files, and the one that runs on every node.
READ_ONLY = {("generate",), ("plan",), ("status",), ("preflight",), ("prep", "show"), ("prep", "verify")}
ANSWERS = {"--help", "-h", "--print_config", "--print-config"}


def refuse_copies(words: Sequence[str]) -> None:
    """Raise ConfigError if a launcher started several processes of a command of `rdt` that writes files.

    Commands that write nothing are accepted.

    Raises:
        ConfigError: the command would write the same files in every process.
    """
    if ANSWERS & set(words) or {tuple(words[:1]), tuple(words[:2])} & READ_ONLY:
        return
    process = read_process_info()
    if process.world_size == 1:
        return
    if words[0] == "train":
        remedy = "Start launch/pretrain.py in its place, or rdt train once with --nproc."
    elif words[0] == "prep":
        remedy = "Start it once; more machines take part as workers of --scheduler."
    else:
        remedy = "Start it once."
    raise ConfigError(
        f"this is process {process.rank} of {process.world_size} that {LAUNCHERS[process.launcher]} started, and all of "
        f"them would write the same files. {remedy} If no launcher started it, or if every process writes files of "
        f"its own, unset {VARIABLES[process.launcher]}."
    )
