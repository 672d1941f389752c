"""Modules of training systems whose cost lies in an op of this package."""

from wsss_kernels.nn.cross_image_attention import CrossImageAttention
from wsss_kernels.nn.memory_bank import MemoryBank

__all__ = ["CrossImageAttention", "MemoryBank"]
