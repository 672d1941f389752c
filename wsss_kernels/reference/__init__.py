"""Every op in plain PyTorch, with the signature of the op it defines: any device, any floating point dtype, slow."""

from wsss_kernels.reference.boundary_affinity import boundary_affinity
from wsss_kernels.reference.local_affinity import local_affinity
from wsss_kernels.reference.random_walk import random_walk

__all__ = ["boundary_affinity", "local_affinity", "random_walk"]
