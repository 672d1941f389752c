"""The ops: contract, checks and registration, one file each."""

from wsss_kernels.ops.affinity_loss import affinity_loss, affinity_loss_from_features
from wsss_kernels.ops.attention_entropy import attention_entropy
from wsss_kernels.ops.attention_walk import attention_walk
from wsss_kernels.ops.boundary_affinity import boundary_affinity
from wsss_kernels.ops.class_context import class_context
from wsss_kernels.ops.cross_image_attention import cross_image_attention
from wsss_kernels.ops.dense_crf import dense_crf
from wsss_kernels.ops.dense_energy_loss import dense_energy_loss
from wsss_kernels.ops.hspp import hspp
from wsss_kernels.ops.kmeans import kmeans
from wsss_kernels.ops.local_affinity import local_affinity
from wsss_kernels.ops.mask_vote import mask_vote
from wsss_kernels.ops.pixel_adaptive import pixel_adaptive
from wsss_kernels.ops.random_walk import random_walk
from wsss_kernels.ops.soft_histogram import soft_histogram

__all__ = [
    "affinity_loss",
    "affinity_loss_from_features",
    "attention_entropy",
    "attention_walk",
    "boundary_affinity",
    "class_context",
    "cross_image_attention",
    "dense_crf",
    "dense_energy_loss",
    "hspp",
    "kmeans",
    "local_affinity",
    "mask_vote",
    "pixel_adaptive",
    "random_walk",
    "soft_histogram",
]
