"""The picture of the heads shows what it is given: where, how much, and what went."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from peft_lightning.analysis.heatmap import draw_heads, short_labels
from peft_lightning.errors import UsageError

MOST, LEAST, CROSS = (253, 231, 36), (68, 1, 84), (0xEE, 0x66, 0x77)
BERT = [f"encoder.layer.{i}.attention.self" for i in range(12)]


def points(path: Path, colour: tuple[int, int, int], part: tuple[float, float] = (0.0, 0.8)) -> list[tuple[int, int]]:
    """Where a picture has exactly this colour, between two shares of its width; the scale is at the right."""
    with Image.open(path) as picture:
        width, pixels = picture.width, picture.convert("RGB").get_flattened_data()
    found = [(i % width, i // width) for i, pixel in enumerate(pixels) if pixel == colour]
    return [(x, y) for x, y in found if part[0] * width <= x < part[1] * width]


def _middle(points: list[tuple[int, int]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def test_a_cell_is_where_its_block_and_head_are(tmp_path: Path) -> None:
    heads = {path: [0.0] * 12 for path in BERT}
    for block, head in ((0, 0), (11, 2)):
        draw_heads(
            {"task": {**heads, BERT[block]: [float(i == head) for i in range(12)]}}, tmp_path / "h.png", title="t"
        )
        most, least = points(tmp_path / "h.png", MOST), points(tmp_path / "h.png", LEAST)
        assert 0.8 < len(least) / len(most) / 143 < 1.25
        (x, y), (left, right) = _middle(most), (min(x for x, _ in least), max(x for x, _ in least))
        assert (x - left) / (right - left) == pytest.approx((head + 0.5) / 12, abs=0.02)
        bottom, top = max(y for _, y in least), min(y for _, y in least)
        assert (bottom - y) / (bottom - top) == pytest.approx((block + 0.5) / 12, abs=0.02)


def test_all_panels_have_one_scale(tmp_path: Path) -> None:
    panels = {"one": {"layer.0": [0.0, 0.0]}, "two": {"layer.0": [1.0, 1.0]}}
    draw_heads(panels, tmp_path / "h.png", title="two tasks")
    assert max(x for x, _ in points(tmp_path / "h.png", LEAST)) < min(x for x, _ in points(tmp_path / "h.png", MOST))


def test_a_smaller_attention_leaves_blanks(tmp_path: Path) -> None:
    counts = []
    for second in (3, 1, 0):
        draw_heads({"t": {"a.0": [0.0] * 3, "b.0": [0.0] * second}}, tmp_path / "h.png", title="t")
        counts.append(len(points(tmp_path / "h.png", LEAST)))
    assert counts[1] / counts[0] == pytest.approx(4 / 6, abs=0.05)
    assert counts[2] / counts[0] == pytest.approx(3 / 6, abs=0.05)


def test_heads_that_went_are_crossed_by_their_own_numbers(tmp_path: Path) -> None:
    heads = {"x": {path: [0.0] * 12 for path in BERT}, "y": {path: [0.0] * 12 for path in BERT}}
    file = tmp_path / "h.png"
    draw_heads(heads, file, title="t")
    assert not points(file, CROSS, (0, 1))
    draw_heads(heads, file, title="t", gone={"x": {BERT[2]: [0, 11]}, "y": {BERT[2]: []}})
    crossed, panel = points(file, CROSS), points(file, LEAST, (0, 0.45))
    left, right = min(x for x, _ in panel), max(x for x, _ in panel)
    bottom, top = max(y for _, y in panel), min(y for _, y in panel)
    assert max(x for x, _ in crossed) <= right
    for head in (0, 11):
        x, y = _middle([(x, y) for x, y in crossed if (x < (left + right) / 2) == (head == 0)])
        assert (x - left) / (right - left) == pytest.approx((head + 0.5) / 12, abs=0.02)
        assert (bottom - y) / (bottom - top) == pytest.approx(2.5 / 12, abs=0.02)


@pytest.mark.parametrize("panels", [{}, {"t": {}}, {"t": {"layer.0": []}}, {"t": {"layer.0": [0.5]}, "u": {}}])
def test_nothing_to_draw(panels: dict[str, dict[str, list[float]]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="panels is empty: a picture needs at least one, with a head"):
        draw_heads(panels, tmp_path / "h.png", title="t")
    assert not (tmp_path / "h.png").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ({"t": {"layer.0": [2]}}, "gone: t has 2 heads in layer.0, and none of number 2"),
        ({"t": {"layer.0": [0, -1]}}, "none of number -1"),
        ({"t": {"layer.1": [0]}}, "t has 0 heads in layer.1"),
        ({"u": {"layer.0": [0]}}, "u has 0 heads in layer.0"),
    ],
)
def test_a_head_that_is_not_there(gone: dict[str, dict[str, list[int]]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        draw_heads({"t": {"layer.0": [0.0, 1.0]}}, tmp_path / "h.png", title="t", gone=gone)


def test_labels_say_what_differs() -> None:
    assert short_labels(BERT) == [str(i) for i in range(1, 13)]
    assert short_labels(["layers.0.self_attn"]) == ["1"]
    bart = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"]
    assert short_labels(bart) == ["encoder 1 self_attn", "decoder 1 self_attn", "decoder 1 encoder_attn"]
    assert short_labels([path.rpartition(".")[0] for path in bart[:2]]) == ["encoder 1", "decoder 1"]
    for unlike in (["a.0", "a.0.b"], ["a.0.b", "a.0"], ["same"]):
        assert short_labels(unlike) == unlike
    assert short_labels([]) == []
