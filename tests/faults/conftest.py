"""Options of the runs that faults are injected into, and a table of what each fault cost, printed after the tests."""

from collections.abc import Callable

import pytest

COSTS = pytest.StashKey[list[tuple[str, str, str]]]()

RecordCost = Callable[[str, float | None, str | int], None]


@pytest.fixture
def record_cost(request: pytest.FixtureRequest) -> RecordCost:
    """A function that takes a fault, the seconds until the run was where it had been, and the steps that it repeated.

    None instead of the seconds: the run goes on, or ends, without losing any.
    """

    def record(fault: str, seconds: float | None, steps: str | int) -> None:
        lost = "none" if seconds is None else f"{seconds:.1f} s"
        request.config.stash.setdefault(COSTS, []).append((fault, lost, str(steps)))

    return record


@pytest.fixture(scope="session")
def faulty_options(tiny_options: list[str]) -> list[str]:
    """Options of a quick run whose every step is recorded at once, without evaluations; two processes."""
    return [*tiny_options, "--parallel.engine=fsdp", "--eval.every=0", "--logging.every=1"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the faults cost."""
    costs = config.stash.get(COSTS, [])
    if costs:
        terminalreporter.section("cost of faults")
        for fault, seconds, steps in costs:
            terminalreporter.line(f"{fault}: time lost {seconds}, steps repeated {steps}")
