"""Lines of Markdown tables."""

from collections.abc import Iterable, Sequence


def format_header(columns: Sequence[str], left: int = 0) -> str:
    """The two lines at the top of a table; the first `left` columns are aligned left, the others right."""
    return f"{format_row(columns)}\n|{'---|' * left}{'---:|' * (len(columns) - left)}"


def format_row(cells: Iterable[object]) -> str:
    """Format one line of a Markdown table, "| a | b |", without a line break."""
    return f"| {' | '.join(map(str, cells))} |"
