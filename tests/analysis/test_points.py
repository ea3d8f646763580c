"""Points with bars are where they belong, and beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from peft_lightning.analysis.plots import Curve
from peft_lightning.analysis.points import draw_points
from peft_lightning.errors import UsageError

BLUE, RED, GREY = (0x33, 0x22, 0x88), (0xCC, 0x66, 0x77), (0x55, 0x55, 0x55)


def _pixels(path: Path, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Column and row of each pixel of this colour in the first of two panels."""
    with Image.open(path) as picture:
        width, pixels = picture.width, list[Any](picture.convert("RGB").get_flattened_data())
    left = (i for i in range(len(pixels)) if i % width < 0.42 * width)
    # a thin line is drawn a little lighter
    return [(i % width, i // width) for i in left if max(abs(pixels[i][k] - colour[k]) for k in range(3)) < 30]


def _curve(x: list[float], height: float, around: float) -> Curve:
    return Curve(x=x, mean=[height] * len(x), low=[height - around] * len(x), high=[height + around] * len(x))


def test_higher_scores_are_higher_and_bars_as_long_as_intervals(tmp_path: Path) -> None:
    panel = {"first": _curve([10, 30], 0.8, 0.15), "second": _curve([10, 30], 0.3, 0.05)}
    draw_points(
        {"one": panel, "two": panel}, {"one": 0.55}, tmp_path / "p.png", across="shots", up="accuracy", title="t"
    )
    blue, red = (_pixels(tmp_path / "p.png", colour) for colour in (BLUE, RED))
    assert max(y for _, y in blue) < min(y for _, y in red)
    heights = [max(y for _, y in found) - min(y for _, y in found) for found in (blue, red)]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.2)
    grey = {y for _, y in _pixels(tmp_path / "p.png", GREY)}
    assert any(max(y for _, y in blue) < y < min(y for _, y in red) for y in grey)


def test_points_of_one_place_stand_beside_one_another(tmp_path: Path) -> None:
    panel = {"first": _curve([10], 0.5, 0.2), "second": _curve([10], 0.5, 0.2)}
    draw_points({"one": panel, "two": panel}, {}, tmp_path / "p.png", across="shots", up="accuracy", title="t")
    blue, red = (_pixels(tmp_path / "p.png", colour) for colour in (BLUE, RED))
    assert max(x for x, _ in blue) < min(x for x, _ in red)


def test_a_label_looks_alike_in_all_panels(tmp_path: Path) -> None:
    first, second = _curve([1], 0.5, 0.1), _curve([1], 0.4, 0.1)
    panels = {"one": {"a": first, "b": second}, "two": {"b": second}}
    draw_points(panels, {}, tmp_path / "p.png", across="shots", up="accuracy", title="t")
    with Image.open(tmp_path / "p.png") as picture:
        width, pixels = picture.width, picture.convert("RGB").get_flattened_data()
    right = {pixel for i, pixel in enumerate(pixels) if 0.5 * width < i % width < 0.8 * width}
    assert RED in right
    assert BLUE not in right


@pytest.mark.parametrize("panels", [{}, {"one": {}}])
def test_nothing_to_draw(panels: dict[str, dict[str, Curve]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="panels is empty, or one of them"):
        draw_points(panels, {}, tmp_path / "p.png", across="shots", up="accuracy", title="t")
