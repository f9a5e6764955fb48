"""Pictures of a comparison: the order of their panels."""

from pathlib import Path

import matplotlib.image

from megatron_rdt.compare.pictures import _arrange_panels, draw_accuracy


def test_built_in_arms_are_columns_and_values_of_axes_rows() -> None:
    arms = ["looped+window=2", "looped+window=0", "untied+window=2", "untied+window=0"]
    assert _arrange_panels(arms) == [["looped+window=2", "untied+window=2"], ["looped+window=0", "untied+window=0"]]
    assert _arrange_panels(arms[:3]) == [["looped+window=2", "untied+window=2"], ["looped+window=0", None]]
    assert _arrange_panels(["looped", "unlooped", "untied"]) == [["looped", "unlooped", "untied"]]
    several = [f"looped+lr={n}" for n in range(6)]
    assert _arrange_panels(several) == [several[:4], [*several[4:], None, None]]


def test_a_panel_is_as_wide_as_its_loop_counts_and_an_empty_one_is_blank(tmp_path: Path) -> None:
    cells = [
        {"task": "t", "difficulty": d, "loops": t, "accuracy": 0.5, "trained": d == 1}
        for d in (1, 2)
        for t in (1, 2, 4)
    ]
    once = [cell for cell in cells if cell["loops"] == 1]
    wide = matplotlib.image.imread(draw_accuracy({"looped": cells}, tmp_path / "one.png"))
    both = matplotlib.image.imread(
        draw_accuracy({"looped+a=1": cells, "untied+a=1": once, "looped+a=2": cells}, tmp_path / "b.png")
    )
    assert both.shape[1] > wide.shape[1]
    assert both.shape[0] > 1.5 * wide.shape[0]
    white = (both[..., :3] == 1).all(axis=-1)
    height, width = white.shape
    # Below the untied panel there is nothing; the colour bar is further to the right.
    assert white[int(0.6 * height) :, int(0.62 * width) : int(0.78 * width)].mean() > 0.99
