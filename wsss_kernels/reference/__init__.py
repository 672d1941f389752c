"""Every op in plain PyTorch, with the signature of the op it defines: any device, any floating point dtype, slow."""

from wsss_kernels.reference.affinity_loss import affinity_loss, affinity_loss_from_features
from wsss_kernels.reference.attention_entropy import attention_entropy
from wsss_kernels.reference.attention_walk import attention_walk
from wsss_kernels.reference.boundary_affinity import boundary_affinity
from wsss_kernels.reference.class_context import class_context
from wsss_kernels.reference.cross_image_attention import cross_image_attention
from wsss_kernels.reference.dense_crf import dense_crf
from wsss_kernels.reference.dense_energy_loss import dense_energy_loss
from wsss_kernels.reference.hspp import hspp
from wsss_kernels.reference.kmeans import kmeans
from wsss_kernels.reference.local_affinity import local_affinity
from wsss_kernels.reference.mask_vote import mask_vote
from wsss_kernels.reference.pixel_adaptive import pixel_adaptive
from wsss_kernels.reference.random_walk import random_walk
from wsss_kernels.reference.soft_histogram import soft_histogram

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
