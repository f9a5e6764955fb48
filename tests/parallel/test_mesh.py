"""The dimension along which FSDP2 shards a parameter."""

import pytest

from megatron_rdt.parallel.mesh import choose_sharded_dimension


@pytest.mark.parametrize(
    ("shape", "ranks", "dimension"),
    [
        ((64, 32), 8, 0),
        ((61, 32), 8, 0),  # 64 rows with padding, 1.05 times as many
        ((4, 24, 32), 4, 0),
        ((4, 24, 32), 8, 1),  # half would be padding
        ((4, 20, 32), 8, 2),
        ((4, 20, 30), 8, 0),  # nothing divides
        ((4,), 8, 0),
        ((3, 8), 4, 1),
        ((64, 2048, 2048), 512, 1),
    ],
)
def test_rows_unless_they_would_be_mostly_padding(shape: tuple[int, ...], ranks: int, dimension: int) -> None:
    assert choose_sharded_dimension(shape, ranks) == dimension
