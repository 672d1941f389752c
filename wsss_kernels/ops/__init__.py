"""The ops: contract, checks and registration, one file each."""

from wsss_kernels.ops.boundary_affinity import boundary_affinity
from wsss_kernels.ops.local_affinity import local_affinity
from wsss_kernels.ops.random_walk import random_walk

__all__ = ["boundary_affinity", "local_affinity", "random_walk"]
