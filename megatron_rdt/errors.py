"""The one hierarchy of errors that are meant for the user.

A command-line entry point prints the message of an `RdtError` without a traceback and exits with its
`exit_status`. Every message says what is wrong, where, and ends with what to do about it.
Anything else that escapes is a bug and keeps its traceback.
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # stopped on request after a good save; BSD's EX_TEMPFAIL


class RdtError(Exception):
    """Base of every error that is the user's to solve."""

    exit_status = EXIT_FAILED


class ConfigError(RdtError):
    """The configuration or the command line is wrong; raised before anything starts."""

    exit_status = EXIT_USAGE


class DataError(RdtError):
    """Input text, token shards or a tokenizer are missing, damaged or do not fit together."""


class CheckpointError(RdtError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingError(RdtError):
    """Training cannot go on: non-finite gradients that do not pass, for example."""


class LaunchError(RdtError):
    """Processes could not be started or could not reach each other."""
