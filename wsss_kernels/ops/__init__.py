"""The ops: contract, checks and registration, one file each."""

from wsss_kernels.ops.attention_walk import attention_walk
from wsss_kernels.ops.local_affinity import local_affinity
from wsss_kernels.ops.mask_vote import mask_vote
from wsss_kernels.ops.random_walk import random_walk

__all__ = ["attention_walk", "local_affinity", "mask_vote", "random_walk"]
