"""Pictures are written and show what they are given."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from peft_lightning.analysis.plots import draw_shares


def test_draw_shares(tmp_path: Path) -> None:
    blue = []
    for share in (0.2, 0.8):
        draw_shares({f"layer.{i}.adapter_down.0": share for i in range(6)}, tmp_path / "kept.png")
        with Image.open(tmp_path / "kept.png") as picture:
            pixels = picture.convert("RGB").get_flattened_data()
        blue.append(sum(pixel == (0x44, 0x77, 0xAA) for pixel in pixels))
    assert 3.5 < blue[1] / blue[0] < 4.5
