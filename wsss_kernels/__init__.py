"""Fused refinement kernels for weakly-supervised semantic segmentation."""

from wsss_kernels import reference
from wsss_kernels.boundary_labels import boundary_labels
from wsss_kernels.crf_labels import affinity_labels, confident_labels
from wsss_kernels.info import info
from wsss_kernels.labels import background_threshold, labels_from_maps
from wsss_kernels.neighbours import neighbour_offsets
from wsss_kernels.nn import CrossImageAttention, HybridSpatialPyramidPool, MemoryBank, VisualWordEncoder
from wsss_kernels.ops import (
    affinity_loss,
    affinity_loss_from_features,
    attention_entropy,
    attention_walk,
    boundary_affinity,
    class_context,
    cross_image_attention,
    dense_crf,
    dense_energy_loss,
    hspp,
    kmeans,
    local_affinity,
    mask_vote,
    pixel_adaptive,
    random_walk,
    soft_histogram,
)
from wsss_kernels.ops.dense_crf import unary_from_labels, unary_from_probabilities
from wsss_kernels.reference.kmeans import KMeansResult
from wsss_kernels.refine import refine_cams

__version__ = "0.1.0"

__all__ = [
    "CrossImageAttention",
    "HybridSpatialPyramidPool",
    "KMeansResult",
    "MemoryBank",
    "VisualWordEncoder",
    "__version__",
    "affinity_labels",
    "affinity_loss",
    "affinity_loss_from_features",
    "attention_entropy",
    "attention_walk",
    "background_threshold",
    "boundary_affinity",
    "boundary_labels",
    "class_context",
    "confident_labels",
    "cross_image_attention",
    "dense_crf",
    "dense_energy_loss",
    "hspp",
    "info",
    "kmeans",
    "labels_from_maps",
    "local_affinity",
    "mask_vote",
    "neighbour_offsets",
    "pixel_adaptive",
    "random_walk",
    "reference",
    "refine_cams",
    "soft_histogram",
    "unary_from_labels",
    "unary_from_probabilities",
]
