"""Counts and durations as people read them, at the edges where the prefix or the unit changes."""

import pytest

from megatron_rdt.terminal import format_count, format_duration


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (12.34, "12.3"),
        (999, "999"),
        (999.6, "1k"),
        (28_690, "28.7k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (3e11, "300G"),
        (4.5e21, "4.5Z"),
    ],
)
def test_counts_have_three_digits_and_a_prefix(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0123, "12.3 ms"),
        (3.44, "3.44 s"),
        (99.4, "99.4 s"),
        (185, "3:05 min"),
        (5969, "99:29 min"),
        (7500, "2:05 h"),
        (3600 * 1234 + 120, "1,234:02 h"),
    ],
)
def test_durations_have_the_unit_that_is_read_easily(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
