"""Options that `rdt compare` and `rdt scale` share: how their runs are trained and measured on this machine."""

from dataclasses import dataclass

from megatron_rdt.errors import ConfigError


@dataclass(frozen=True)
class ArmOptions:
    """Options of the runs of a comparison."""

    sequences: int = 256
    """Validation sequences to measure every run on, the same for all."""
    at_once: int = 0
    """Runs at the same time; 0: one for each core or GPU that the processes of a run leave free."""
    nproc: int = 0
    """Processes of each run; 0: 1 for engine single, otherwise 2."""
    retry: bool = False
    """Train runs that failed again."""
    dry_run: bool = False
    """Print the runs, their weights, FLOPs and time, and train nothing."""

    def check(self) -> None:
        """Raise ConfigError for a number that is too small."""
        for name, least in (("sequences", 1), ("at_once", 0), ("nproc", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}, it must be at least {least}.")
