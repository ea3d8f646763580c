"""The picture of a merge: which panels it has, which lines, and what its bands hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from matplotlib.figure import Figure

from peft_lightning.analysis import merging
from peft_lightning.analysis.merging import draw_merge, site_figure
from peft_lightning.errors import UsageError


def report(sites: dict[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
    return {"preset": "acts", "sources": ["a", "b", "c"], "sites": sites, **options}


HOULSBY = {
    f"encoder.layer.{layer}.{place}": {
        "reference": "b",
        "cosine": [0.5 + layer / 10, 1.0, 0.7 + layer / 10],
        "norm_ratio": 0.9 - layer / 10,
        "output_error": None if layer == 1 else 0.3,
    }
    for layer in (0, 1, 10)
    for place in ("attention.output", "output")
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures instead of files."""
    figures: list[Figure] = []
    monkeypatch.setattr(merging, "save_png", lambda figure, path: figures.append(figure))
    return figures


def test_a_panel_a_figure_and_a_line_a_place(drawn: list[Figure]) -> None:
    draw_merge(report(HOULSBY), "unused.png")
    (figure,) = drawn
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "matched cosine",
        "norm / mean norm of the adapters",
        "output error against the mean",
    ]
    cosine, _, error = cast(list[Any], figure.axes)
    assert [line.get_label() for line in cosine.lines] == ["attention.output", "output"]
    assert list(cosine.lines[0].get_xdata()) == [0, 1, 10]
    assert list(cosine.lines[0].get_ydata()) == pytest.approx([0.6, 0.7, 1.6])  # without the reference
    band = cosine.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.5, 1.7))
    assert list(error.lines[0].get_xdata()) == [0, 10]  # what is unknown has no point
    assert all(axes.get_ylim()[0] <= 0 for axes in figure.axes)


def test_the_legend_is_beside_the_panels_and_the_title_names_all_adapters(drawn: list[Figure]) -> None:
    names = [f"adapter_{number}_of_a_long_name" for number in range(8)]
    draw_merge({**report(HOULSBY), "sources": [*"abc", *names]}, "unused.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    panels = [axes.get_window_extent() for axes in figure.axes]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["attention.output", "output"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert legend.get_window_extent().x0 > max(panel.x1 for panel in panels)
    title: Any = figure._suptitle  # type: ignore[attr-defined]
    assert all(name in title.get_text() for name in names)
    box, whole = title.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y0 > max(panel.y1 for panel in panels)


def test_both_sides_of_an_encoder_decoder_and_single_places(drawn: list[Figure]) -> None:
    sites = {path: {"norm_ratio": 1.0} for path in ("encoder.layers.0.fc2", "decoder.layers.0.fc2", "decoder.layers.0")}
    draw_merge(report(sites), "unused.png")
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["encoder fc2", "decoder fc2", "decoder layer"]


def test_nothing_to_draw(drawn: list[Figure]) -> None:
    with pytest.raises(UsageError, match="has no figure to draw"):
        draw_merge(report({"encoder.layer.0": {"norm_ratio": None}}), "unused.png")


def test_figures_of_a_site() -> None:
    found = report(HOULSBY)
    assert site_figure(found, "encoder.layer.0.output", "cosine") == [0.5, 0.7]
    assert site_figure(found, "encoder.layer.0.output", "norm_ratio") == [0.9]
    assert site_figure(found, "encoder.layer.1.output", "output_error") == []
    assert site_figure(found, "encoder.layer.1.output", "lost") == []
    alone = {"x.0": {"cosine": [1.0], "reference": "a"}}
    assert site_figure(report(alone, sources=["a"]), "x.0", "cosine") == [1.0]


def test_the_file_is_a_picture(tmp_path: Path) -> None:
    draw_merge(report(HOULSBY, sources=["a" * 200, "b", "c"]), tmp_path / "merge.png")
    assert (tmp_path / "merge.png").read_bytes().startswith(b"\x89PNG")
