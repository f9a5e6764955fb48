"""The `rdt` command: finds the command that was typed, runs it, and turns failures into messages and exit statuses."""

import sys
from pathlib import Path

from launch.interruption import BEFORE_TRAINING, KEPT, Interrupted, describe_end, leave_at_once, raise_interrupts

# Commands that train are asked to stop by a signal, and not interrupted: how each goes on.
WHEN_ASKED = {"train": BEFORE_TRAINING, "compare": KEPT, "scale": KEPT}

# The imports below take a while. A worker of `rdt prep` imports this module too, as a part of `__mp_main__`.
if __name__ == "__main__" or (Path(sys.argv[0]).name == "rdt" and "__mp_main__" not in sys.modules):
    leave_at_once(" ".join(["rdt", *filter(str.isalpha, sys.argv[1:2])]), WHEN_ASKED.get("".join(sys.argv[1:2]), ""))

import difflib
import functools
import importlib
from collections.abc import Callable

import megatron_rdt
from launch.failures import EXIT_INTERRUPTED, explain
from launch.single_process import refuse_copies
from megatron_rdt.environment import quiet_libraries
from megatron_rdt.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from megatron_rdt.files import escape_controls
from megatron_rdt.terminal import escape_unencodable, flush_output

EXIT_BROKEN_PIPE = 141  # as a shell reports SIGPIPE
# In the order of `rdt --help`: the function of `launch.commands.NAME`.
COMMANDS = {
    "prep": "prep",
    "train": "train",
    "eval": "evaluate",
    "generate": "generate",
    "convert": "convert",
    "plan": "plan",
    "submit": "submit",
    "status": "status",
    "preflight": "preflight",
    "compare": "compare",
    "scale": "scale",
    "report": "report",
    "quickstart": "quickstart",
}
# Commands that keep what they have done when they are interrupted.
GOING_ON = ("prep", "quickstart")


def load_command(name: str) -> Callable[[list[str]], int]:
    """Import a command: a function that takes the words after its name and returns the exit status.

    Only when it is used, because the worker processes of `rdt prep` import this module too.
    """
    command: Callable[[list[str]], int] = getattr(importlib.import_module(f"launch.commands.{name}"), COMMANDS[name])
    return command


def format_usage() -> str:
    """Return the text of `rdt --help`: every command with its summary."""
    from launch.command_options import summary_of

    lines = [f"  {name:<11} {summary_of(load_command(name))}" for name in COMMANDS]
    return "\n".join(
        (
            "usage: rdt COMMAND [options]",
            "",
            "Pretraining of recurrent-depth transformers.",
            "",
            *lines,
            "",
            "rdt COMMAND --help explains every option; rdt --version prints the version.",
        )
    )


def run_command(words: list[str]) -> int:
    """Run the command that `words` name; return its exit status, print failures the user can solve, raise bugs."""
    if not words or words[0] in ("-h", "--help"):
        print(format_usage(), file=sys.stdout if words else sys.stderr)
        return EXIT_OK if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(f"rdt {megatron_rdt.__version__}")
        return EXIT_OK
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "rdt --help lists the commands."
        print(f"rdt: error: there is no command {name}. {hint}", file=sys.stderr)
        return EXIT_USAGE
    quiet_libraries()
    from megatron_rdt.config.option_texts import check_words

    try:
        check_words(words)
        refuse_copies(words)
        command = load_command(name)
        with raise_interrupts(functools.partial(_describe_end, words), name in WHEN_ASKED):
            return command(rest)
    except Interrupted as interrupt:
        line, status = _describe_end(words, interrupt.number)
        print(line, file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(f"rdt {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        print(f"rdt {name}: error: {escape_controls(str(explained))}", file=sys.stderr)
        return explained.exit_status


def _describe_end(words: list[str], number: int) -> tuple[str, int]:
    """Return the line and the exit status of the command that `words` name, ended by a signal."""
    name, *rest = words
    line, status = describe_end(f"rdt {name}", WHEN_ASKED.get(name, ""), number)
    goes_on = name in GOING_ON
    if name == "prep":
        from launch.commands.prep import COMMANDS as PREP_COMMANDS

        goes_on = not {*rest[:1]} & {*PREP_COMMANDS}
    return f"{line}{KEPT * goes_on}", status


def main() -> int:
    """Run `rdt` on this process's words; return the exit status, 141 if the reader of its output has gone."""
    escape_unencodable()
    result, exited = EXIT_OK, None
    failure: OSError | None = None
    try:
        result = run_command(sys.argv[1:])
    except SystemExit as done:  # after --help and --print_config
        exited = done
    except BrokenPipeError as error:
        failure = error
    # A reader that has gone, as in `rdt train --help | head`, may be noticed only now.
    failure = flush_output() or failure
    if isinstance(failure, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    if failure is not None:
        print(f"rdt: error: standard output cannot be written: {failure.strerror}.", file=sys.stderr)
        return EXIT_FAILED
    if exited is not None:
        raise exited
    return result


if __name__ == "__main__":
    sys.exit(main())
