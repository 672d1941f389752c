"""Fused refinement kernels for weakly-supervised semantic segmentation."""

from wsss_kernels import reference
from wsss_kernels.info import info
from wsss_kernels.labels import background_threshold, boundary_labels, labels_from_maps
from wsss_kernels.neighbours import neighbour_offsets
from wsss_kernels.ops import boundary_affinity, local_affinity, random_walk
from wsss_kernels.refine import refine_cams

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "background_threshold",
    "boundary_affinity",
    "boundary_labels",
    "info",
    "labels_from_maps",
    "local_affinity",
    "neighbour_offsets",
    "random_walk",
    "reference",
    "refine_cams",
]
