"""The half-disc of neighbours that every local op shares."""

from __future__ import annotations

MAX_RADIUS = 16


_OFFSETS = {
    radius: [
        (dy, dx)
        for dy in range(radius)
        for dx in range(1 - radius, radius)
        if dx * dx + dy * dy < radius * radius and (dy > 0 or dx > 0)
    ]
    for radius in range(1, MAX_RADIUS + 1)
}


def check_radius(radius: int) -> None:
    if not isinstance(radius, int) or isinstance(radius, bool):
        raise TypeError(f"radius must be an int in 1..{MAX_RADIUS} (pixels), got {radius!r}")
    if not 1 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius must be an int in 1..{MAX_RADIUS} (pixels), got {radius}")


def neighbour_offsets(radius: int = 5) -> list[tuple[int, int]]:
    """Offsets (dy, dx), in pixels, of the neighbours a pixel is linked to.

    The half plane dy > 0, or dy = 0 and dx > 0, of the open disc dx^2 + dy^2 < radius^2, row-major. The other half
    follows from symmetry, so K neighbours describe 2 K links of a pixel.

    Args:
        radius: 1..16 pixels. 5 (34 offsets) is what AffinityNet and IRNet use at inference, 10 (152) IRNet's training.

    Returns:
        K pairs (dy, dx); axis 1 of every [B, K, H, W] affinity follows this order.

    Raises:
        TypeError, ValueError: radius is no whole number in range.

    Source: Ahn and Kwak, CVPR 2018, section 3.2, and the published code's order.

    Example:
        >>> neighbour_offsets(2)
        [(0, 1), (1, -1), (1, 0), (1, 1)]
    """
    check_radius(radius)
    return list(_OFFSETS[radius])


def neighbour_count(radius: int) -> int:
    """K of a valid radius."""
    return len(_OFFSETS[radius])


def neighbour_path(offset: tuple[int, int]) -> list[tuple[int, int]]:
    """Pixels (dy, dx) on the way from a neighbour back to the pixel, both ends included.

    All whole points of the box the two span that lie less than a pixel off the line between them, sorted by descending
    |dy| + |dx|, equal ones row-major: the neighbour comes first. A diagonal step thus holds both pixels it passes
    between, so that no path slips through a diagonal line.

    Source: Ahn, Cho and Kwak, CVPR 2019, section 4.2, and the published code's order.
    """
    dy, dx = offset
    box = [(y, x) for y in range(min(0, dy), max(0, dy) + 1) for x in range(min(0, dx), max(0, dx) + 1)]
    near = [(y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
    return sorted(near, key=lambda point: -abs(point[0]) - abs(point[1]))
