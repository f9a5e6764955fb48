"""`rdt report`: the records of a run as one HTML page."""

from dataclasses import dataclass

from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK
from megatron_rdt.files import PathText


@dataclass(frozen=True)
class ReportOptions:
    """Options of `rdt report`."""

    run: PathText
    """Run directory, such as runs/quickstart."""
    comparison: PathText | None = None
    """Directory of a comparison on tasks, such as runs/quickstart-depth-compare: its accuracies open the page."""


def report(words: list[str]) -> int:
    """Draw a run's curves into one HTML page."""
    options = parse_options("report", summary_of(report), ReportOptions, words)
    from megatron_rdt.evaluate.report import write_report

    print(f"written: {write_report(options.run, options.comparison)}")
    return EXIT_OK
