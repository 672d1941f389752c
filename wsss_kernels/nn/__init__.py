"""The training ops with their parameters, one module a file."""

from wsss_kernels.nn.hybrid_spatial_pyramid_pool import HybridSpatialPyramidPool
from wsss_kernels.nn.visual_word_encoder import VisualWordEncoder

__all__ = ["HybridSpatialPyramidPool", "VisualWordEncoder"]
