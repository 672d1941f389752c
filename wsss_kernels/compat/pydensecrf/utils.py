"""pydensecrf.utils: unaries in its layout, [n_labels, pixels] float32."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

_NOT_OFFERED = ("compute_unary", "softmax_to_unary", "create_pairwise_gaussian", "create_pairwise_bilateral")


def __getattr__(name: str) -> NoReturn:
    if name in _NOT_OFFERED:
        raise AttributeError(
            f"wsss_kernels.compat.pydensecrf.utils does not offer pydensecrf's {name}: only unary_from_labels and "
            "unary_from_softmax"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def unary_from_labels(labels: np.ndarray, n_labels: int, gt_prob: float, zero_unsure: bool = True) -> np.ndarray:
    """Energies of labels that are right with probability gt_prob.

    Args:
        labels: whole numbers, any shape. With zero_unsure, 0 says "could be anything" and the labels are 1..n_labels;
            otherwise they are 0..n_labels - 1.
        n_labels: number of labels, not counting the unsure 0; >= 2.
        gt_prob: in (0, 1).
        zero_unsure: see labels.

    Returns:
        [n_labels, labels.size] float32.

    Raises:
        TypeError, ValueError: an argument outside this contract, named (pydensecrf lets a negative label count from
            the end).
    """
    labels = np.asarray(labels).ravel()
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}")
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must be in (0, 1), got {gt_prob!r}")
    if n_labels < 2:
        raise ValueError(f"n_labels must be at least 2, got {n_labels!r}")
    first = 1 if zero_unsure else 0
    index = labels.astype(np.int64) - first
    unsure = index == -1 if zero_unsure else np.zeros(len(labels), dtype=bool)
    wrong = labels[~unsure & ((index < 0) | (index >= n_labels))]
    if wrong.size:
        raise ValueError(f"labels must be in 0..{n_labels - 1 + first}, got {wrong[0]}")
    energy = np.full((n_labels, len(labels)), -np.log((1 - gt_prob) / (n_labels - 1)), dtype=np.float32)
    energy[index, np.arange(len(labels))] = -np.log(gt_prob)
    energy[:, unsure] = -np.log(1 / n_labels)
    return energy


def unary_from_softmax(sm: np.ndarray, scale: float | None = None, clip: float | None = 1e-5) -> np.ndarray:
    """Energies of class probabilities.

    Args:
        sm: [n_labels, ...] probabilities.
        scale: in (0, 1], or None = 1: how far sm is trusted against the uniform distribution.
        clip: least probability; None: as they are.

    Returns:
        [n_labels, pixels] float32.

    Raises:
        ValueError: scale is not in (0, 1].
    """
    sm = np.asarray(sm)
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale must be in (0, 1] or None, got {scale!r}")
        sm = scale * sm + (1 - scale) / sm.shape[0]
    if clip is not None:
        sm = np.clip(sm, clip, 1.0)
    return -np.log(sm).reshape(sm.shape[0], -1).astype(np.float32)
