"""Maps and labels over photographs, and sheets of panels with titles. Pillow and NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_INK, _SOFT, _PAPER = (20, 20, 24), (95, 95, 105), (255, 255, 255)
_MARGIN = 14  # pixels between panels and round the sheet


@dataclass(frozen=True)
class Row:
    """One line of a sheet: a heading over panels of one shape."""

    heading: str
    note: str  # smaller, under the heading; "" for none
    panels: Sequence[np.ndarray]  # each [H, W, 3] uint8


def overlay_maps(picture: np.ndarray, maps: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """The picture, greyed, with each map as a glow of its colour.

    Args:
        picture: [H, W, 3] uint8.
        maps: [C, H, W] in 0..1; 1 is the full colour.
        colours: C of them, RGB 0..255.

    Returns:
        np.ndarray: [H, W, 3] uint8.
    """
    out = _greyed(picture)
    for values, colour in zip(maps, colours, strict=True):
        weight = 0.85 * np.clip(np.nan_to_num(values), 0, 1)[..., None]
        out = out * (1 - weight) + np.asarray(colour, dtype=np.float32) * weight
    return _to_uint8(out)


def overlay_label(picture: np.ndarray, label: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """The picture with each class tinted and outlined, the background grey and dark.

    Args:
        picture: [H, W, 3] uint8.
        label: [H, W] integers, 0 = background, c = colours[c - 1]; others (255, ignore) are left untinted.
        colours: RGB 0..255.

    Returns:
        np.ndarray: [H, W, 3] uint8.
    """
    out, full = 0.55 * _greyed(picture), picture.astype(np.float32)
    for index, colour in enumerate(colours, start=1):
        inside = label == index
        out[inside] = 0.55 * full[inside] + 0.45 * np.asarray(colour, dtype=np.float32)
        out[_outline(inside, max(1, max(label.shape) // 300))] = colour
    return _to_uint8(out)


def sheet(
    title: str, columns: Sequence[str], rows: Sequence[Row], footer: Sequence[str] = (), *, width: int = 320
) -> Image.Image:
    """A page of panels: one column a step, one row a picture.

    Args:
        title: over everything.
        columns: titles of the columns, as many as a row has panels.
        rows: headings, notes and panels; panels are scaled to `width`.
        footer: lines under the last row.
        width: of a panel, in pixels.

    Returns:
        PIL.Image.Image: RGB.
    """
    big, middle, small = (ImageFont.load_default(size=size) for size in (26, 18, 15))
    total = _MARGIN + len(columns) * (width + _MARGIN)
    notes = [_wrapped(row.note, small, total - 2 * _MARGIN) for row in rows]
    foot = [line for text in footer for line in _wrapped(text, small, total - 2 * _MARGIN)]
    heights = [max(round(width * p.shape[0] / p.shape[1]) for p in row.panels) for row in rows]
    heads = [30 + 20 * len(lines) for lines in notes]
    height = 96 + sum(heights) + sum(heads) + _MARGIN * (len(rows) + 1) + 20 * len(foot)
    page = Image.new("RGB", (total, height), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 12), title, fill=_INK, font=big)
    for i, column in enumerate(columns):
        draw.text((_MARGIN + i * (width + _MARGIN), 60), column, fill=_INK, font=middle)
    y = 90
    for row, lines, head, height in zip(rows, notes, heads, heights, strict=True):
        draw.line([(_MARGIN, y), (total - _MARGIN, y)], fill=(215, 215, 220))
        draw.text((_MARGIN, y + 5), row.heading, fill=_INK, font=middle)
        for i, line in enumerate(lines):
            draw.text((_MARGIN, y + 28 + 20 * i), line, fill=_SOFT, font=small)
        y += head
        for i, panel in enumerate(row.panels):
            size = (width, round(width * panel.shape[0] / panel.shape[1]))
            scaled = Image.fromarray(panel).resize(size, Image.Resampling.LANCZOS)
            page.paste(scaled, (_MARGIN + i * (width + _MARGIN), y))
        y += height + _MARGIN
    for i, line in enumerate(foot):
        draw.text((_MARGIN, y + 20 * i), line, fill=_SOFT, font=small)
    return page


def _greyed(picture: np.ndarray) -> np.ndarray:
    """Half its colour, so that a tint stands out."""
    full = picture.astype(np.float32)
    return 0.35 * full + 0.65 * full.mean(axis=2, keepdims=True)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _outline(inside: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the region within `thickness` of its edge; the border of the picture is none."""
    core = inside.copy()
    for _ in range(thickness):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
