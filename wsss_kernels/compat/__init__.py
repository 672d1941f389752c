"""Small bridges to what other packages hold: NumPy heat maps and transformer tokens."""

from wsss_kernels.compat.heatmaps import refine_numpy
from wsss_kernels.compat.tokens import tokens_to_map

__all__ = ["refine_numpy", "tokens_to_map"]
