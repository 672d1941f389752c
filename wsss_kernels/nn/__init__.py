"""The training ops with their parameters or state, one module a file."""

from wsss_kernels.nn.cross_image_attention import CrossImageAttention
from wsss_kernels.nn.hybrid_spatial_pyramid_pool import HybridSpatialPyramidPool
from wsss_kernels.nn.memory_bank import MemoryBank
from wsss_kernels.nn.visual_word_encoder import VisualWordEncoder

__all__ = ["CrossImageAttention", "HybridSpatialPyramidPool", "MemoryBank", "VisualWordEncoder"]
