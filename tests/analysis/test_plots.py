"""Pictures are written and show what they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from peft_lightning.analysis.plots import Curve, draw_curves, draw_layers, draw_shares, draw_sweep
from peft_lightning.errors import UsageError

BLUE, RED = (0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)


def _points(path: Path, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Where a picture has exactly this colour: column and row of each pixel."""
    with Image.open(path) as picture:
        width, pixels = picture.width, picture.convert("RGB").get_flattened_data()
    return [(i % width, i // width) for i, pixel in enumerate(pixels) if pixel == colour]


def _flat(x: list[float], height: float, around: float = 0.0) -> Curve:
    return Curve(x=x, mean=[height] * len(x), low=[height - around] * len(x), high=[height + around] * len(x))


def test_draw_shares(tmp_path: Path) -> None:
    blue = []
    for share in (0.2, 0.8):
        draw_shares({f"layer.{i}.adapter_down.0": share for i in range(6)}, tmp_path / "kept.png")
        blue.append(len(_points(tmp_path / "kept.png", BLUE)))
    assert 3.5 < blue[1] / blue[0] < 4.5


def test_draw_curves_puts_higher_values_higher_and_a_label_in_one_colour(tmp_path: Path) -> None:
    curves = {"low": _flat([0, 1, 2], 0.2), "high": _flat([0, 1, 2], 0.8)}
    panels = {"loss": curves, "accuracy": dict(reversed(curves.items()))}
    draw_curves(panels, tmp_path / "curves.png", across="steps", title="two arms")
    blue, red = _points(tmp_path / "curves.png", BLUE), _points(tmp_path / "curves.png", RED)
    with Image.open(tmp_path / "curves.png") as picture:
        middle = picture.width // 2
    for side in (lambda x: x < middle, lambda x: x >= middle):
        # the lowest row of a colour belongs to its line, whatever the legend shows above it
        assert max(y for x, y in blue if side(x)) > max(y for x, y in red if side(x)) + 50


def test_draw_curves_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="panels is empty"):
        draw_curves({}, tmp_path / "curves.png", across="steps", title="none")


def test_draw_layers_puts_curves_before_the_shaded_layers(tmp_path: Path) -> None:
    panels = {
        "tense": {"full": _flat([0, 1, 2, 3], 80, 2), "dropped": _flat([0, 1, 2, 3], 60)},
        "number": {"dropped": _flat([0, 1, 2, 3], 70)},
    }
    ground: list[list[tuple[int, int]]] = []
    for shaded in (None, (1, 2), (1, 3)):
        draw_layers(panels, {"tense": 50.0}, tmp_path / "l.png", up="accuracy", title="layers", shaded=shaded)
        ground.append(_points(tmp_path / "l.png", (0xE4, 0xE4, 0xE4)))
    assert len(ground[0]) < 50 and 1.3 < len(ground[2]) / len(ground[1]) < 1.6
    with Image.open(tmp_path / "l.png") as picture:
        middle = picture.width // 2
    blue, red = _points(tmp_path / "l.png", BLUE), _points(tmp_path / "l.png", RED)
    assert max(y for _, y in blue) < max(y for x, y in red if x < middle)
    # a model has its colour in every panel
    assert any(x > middle for x, _ in red) and not any(x > middle for x, _ in blue)
    with pytest.raises(UsageError, match="panels is empty"):
        draw_layers({}, {}, tmp_path / "l.png", up="accuracy", title="none")


def test_draw_sweep_shows_its_error_bars(tmp_path: Path) -> None:
    blue = []
    for around in (0.01, 0.1):
        level = {"dense": _flat([0.0], 0.5, 0.2)}
        sweep = {"snip": _flat([20, 40, 60], 0.5, around), "random": _flat([40], 0.45)}
        draw_sweep(sweep, level, tmp_path / "sweep.png", across="removed", up="accuracy", title="a sweep")
        blue.append(len(_points(tmp_path / "sweep.png", BLUE)))
        assert _points(tmp_path / "sweep.png", RED)
    assert blue[1] > blue[0] + 100


def test_a_level_has_one_point(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="level 'dense' has 2 points: it must have one"):
        draw_sweep({}, {"dense": _flat([0, 1], 0.5)}, tmp_path / "s.png", across="x", up="y", title="t")


def test_a_curve_has_equally_many_of_everything() -> None:
    with pytest.raises(UsageError, match=r"'x': 1, 'mean': 2.*must be equal"):
        Curve(x=[0], mean=[0, 1], low=[0], high=[0])
