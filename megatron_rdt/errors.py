"""Errors that are the user's to solve, and the exit statuses of commands.

A command prints the message of an `RdtError` without a traceback and exits with its `exit_status`. Every message says
what is wrong, where, and what to do about it. Any other exception is a bug and keeps its traceback.
"""

import os

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # stopped on request after a good save; BSD's EX_TEMPFAIL
EXIT_HANG = 76  # a collective took longer than its limit
EXIT_SIGNAL = 128  # plus the number of the signal that ended it, as a shell reports it

# Parts of the errors of Gloo and NCCL when another rank did not come in time.
TIMED_OUT = ("Timed out waiting", "Operation timed out", "timeout caused pair closure", "Watchdog caught collective")
USE_ANOTHER = "Use another checkpoint."  # the way out where one is damaged or unfit


class RdtError(Exception):
    """Base class of the errors that are the user's to solve."""

    exit_status = EXIT_FAILED


class ConfigError(RdtError):
    """The configuration or the command line is wrong; raised before anything starts."""

    exit_status = EXIT_USAGE


class DataError(RdtError):
    """Input text, token shards or a tokenizer are missing, damaged or do not fit together."""


class CheckpointError(RdtError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; the same on all ranks, and earlier ones are untouched.

    Attributes:
        problem: sentences on what failed and why.
        remedy: a clause on what to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}, then start again with --resume auto.")
        self.problem, self.remedy = problem, remedy


class TrainingError(RdtError):
    """Training cannot continue, for example because gradients stay non-finite."""


class LaunchError(RdtError):
    """Processes could not be started or could not reach each other."""


def suggest_init(checkpoint: str | os.PathLike[str]) -> str:
    """The way out where a run cannot continue from a checkpoint: a clause that names a new run from its weights."""
    return f"start a new --run.name from its weights: --init {os.fspath(checkpoint)}"


class LockLostError(RdtError):
    """Another process has taken over a lock of this one, which seemed dead: this one must not write any more."""


class LostPeerError(LaunchError):
    """Another rank is gone, hangs or has failed: on most ranks a consequence of the failure, not its cause."""


class HangError(LostPeerError):
    """A collective, or a message of another rank, took longer than its limit: some rank hangs or is too slow."""

    exit_status = EXIT_HANG
