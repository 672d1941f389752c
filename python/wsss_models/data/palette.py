"""The colours of PASCAL VOC label pictures."""

from __future__ import annotations

import numpy as np


def voc_palette() -> np.ndarray:
    """[256, 3] uint8 RGB: colour of each class id in a VOC label PNG.

    The bits of the id go round red, green, blue, the lowest into the highest bit of the colour:
    red bit 7-j = id bit 3j, green bit 7-j = id bit 3j+1, blue bit 7-j = id bit 3j+2.

    Example:
        >>> voc_palette()[[0, 1, 15, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for j in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * j + channel) & 1) << (7 - j)).astype(np.uint8)
    return palette
