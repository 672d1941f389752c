"""Intersection over union of label pictures, and of score maps at every threshold in one pass.

Counts are whole numbers and add up: the shards of a split, evaluated anywhere and summed, give the counts of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk
from wsss_kernels.colour import average_to
from wsss_models.data.artefacts import FileError
from wsss_models.data.files import read_maps
from wsss_models.data.folder import inside
from wsss_models.data.masks import IGNORE, read_mask
from wsss_models.data.pictures import PictureSet

NUM_THRESHOLDS = 100
NORMALIZATIONS = ("image", "class", "none")
_OF_THE_PICTURE = (ValueError, TypeError, RuntimeError, OSError, MemoryError)
T = TypeVar("T")


class Confusion:
    """Pixels by true and predicted class, index 0 the background.

    With counts n[true, predicted], a row's and a column's sum t_c and p_c:

        IoU_c = n_cc / (t_c + p_c - n_cc),    precision_c = n_cc / p_c,    recall_c = n_cc / t_c

    NaN where the denominator is 0; means leave NaN out. Pixels whose truth is 255 are not counted.

    Args:
        num_classes: C, without the background.

    Example:
        >>> counts = Confusion(2)
        >>> counts.add(np.array([[0, 1, 2, 255]]), np.array([[0, 1, 1, 1]]))
        >>> counts.iou().tolist(), counts.mean_iou()
        ([1.0, 0.5, 0.0], 0.5)
    """

    def __init__(self, num_classes: int, counts: np.ndarray | None = None) -> None:
        size = num_classes + 1
        self.counts = np.zeros((size, size), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
        if self.counts.shape != (size, size):
            raise ValueError(f"counts must be [{size}, {size}] for {num_classes} classes, got {self.counts.shape}")

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count a picture: integers of one shape; truth 0..C or 255, prediction 0..C where the truth is not 255.

        Raises:
            ValueError: shapes differ, or a class is outside 0..C.
        """
        self.counts += _pair_counts(truth, prediction, len(self.counts))

    def __iadd__(self, other: Confusion) -> Confusion:
        self.counts += other.counts
        return self

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(len(self.counts) - 1, self.counts + other.counts)

    def all_reduce(self) -> None:
        """Sum over the processes of torch.distributed, exactly; each must have counted pictures of its own."""
        self.counts = summed_over_processes(self.counts)

    def iou(self) -> np.ndarray:
        """[C + 1] float64."""
        hit, true, predicted = self._sums()
        return _ratio(hit, true + predicted - hit)

    def precision(self) -> np.ndarray:
        """[C + 1] float64."""
        hit, _, predicted = self._sums()
        return _ratio(hit, predicted)

    def recall(self) -> np.ndarray:
        """[C + 1] float64."""
        hit, true, _ = self._sums()
        return _ratio(hit, true)

    def mean_iou(self) -> float:
        """Over the classes, background included, that the truth or a prediction shows; NaN without any pixel."""
        return _mean(self.iou())

    def pixel_accuracy(self) -> float:
        return float(_ratio(np.trace(self.counts), self.counts.sum()))

    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.diagonal(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)


class ThresholdSweep:
    """Confusion at many background thresholds, each pixel looked at once.

    A pixel's best class k and score s = max_c maps[c] do not depend on the threshold: it is predicted k below s and
    background from s on. A histogram over (truth, k, number of thresholds below s) therefore holds the counts at every
    threshold; `labels_from_maps(maps, background=t)` gives the same labels, ties included.

    Args:
        num_classes: C, without the background.
        thresholds: ascending; default 100 from 0 to 0.99 in steps of 0.01.

    Example:
        >>> sweep = ThresholdSweep(1, [0.1, 0.5])
        >>> sweep.add(np.array([[0, 1]]), np.array([1]), torch.tensor([[[0.3, 0.8]]]))
        >>> sweep.mean_iou().tolist(), sweep.best()[0]
        ([0.25, 1.0], 0.5)
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] | None = None) -> None:
        steps = (
            np.arange(NUM_THRESHOLDS) / NUM_THRESHOLDS if thresholds is None else np.asarray(thresholds, dtype=float)
        )
        if steps.ndim != 1 or not len(steps) or not (np.diff(steps) > 0).all():
            raise ValueError(f"thresholds must be one or more ascending numbers, got {thresholds}")
        self.thresholds = steps
        self.histogram = np.zeros((num_classes + 1, num_classes, len(steps) + 1), dtype=np.int64)

    def add(self, truth: np.ndarray, class_ids: np.ndarray, maps: Tensor) -> None:
        """Count a picture.

        Args:
            truth: [H, W] integers 0..C or 255.
            class_ids: [k] integers 1..C, one a map.
            maps: [k, H, W] float32 scores in the units of the thresholds.
        """
        self.add_counts(self.count(truth, class_ids, maps))

    def count(
        self, truth: np.ndarray, class_ids: np.ndarray, maps: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `add_counts` takes, without changing anything: (true ids [g], class ids [k'], counts [g, k', T + 1])."""
        num_classes, steps = self.histogram.shape[1], len(self.thresholds) + 1
        height, width = _same_shape(truth.shape, tuple(maps.shape[-2:]))
        if not len(class_ids):  # a single class that never wins
            class_ids, maps = np.ones(1, dtype=np.int64), torch.zeros(1, height, width)
        counted = torch.from_numpy(truth.reshape(-1) != IGNORE)
        score, winner = torch.nan_to_num(maps.flatten(1)).max(dim=0)  # ties: the first
        edges = torch.from_numpy(self.thresholds).to(score.dtype)
        below = torch.bucketize(score, edges)[counted]  # how many thresholds are below the score
        true = truth.reshape(-1)[counted.numpy()].astype(np.int64)
        if len(true) and not 0 <= true.min() <= true.max() <= num_classes:
            raise ValueError(f"truth must be in 0..{num_classes} or 255, got {true.min()}..{true.max()}")
        present = np.bincount(true, minlength=num_classes + 1) > 0  # an image shows few of the classes
        true_ids, true_index = np.flatnonzero(present), (np.cumsum(present) - 1)[true]
        if not ((class_ids >= 1) & (class_ids <= num_classes)).all():
            raise ValueError(f"class_ids must be in 1..{num_classes}, got {class_ids.tolist()}")
        cell = (true_index * len(class_ids) + winner[counted].numpy()) * steps + below.numpy()
        shape = (len(true_ids), len(class_ids), steps)
        return true_ids, class_ids, np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape)

    def add_counts(self, counted: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        true_ids, class_ids, counts = counted
        self.histogram[true_ids[:, None], class_ids[None] - 1] += counts

    def __iadd__(self, other: ThresholdSweep) -> ThresholdSweep:
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError("thresholds must be the same in both sweeps, got different ones")
        self.histogram += other.histogram
        return self

    def all_reduce(self) -> None:
        """Sum over the processes of torch.distributed, exactly."""
        self.histogram = summed_over_processes(self.histogram)

    def confusion(self, i: int) -> Confusion:
        """Counts at thresholds[i]."""
        above = self.histogram[:, :, i + 1 :].sum(axis=2)
        ground = self.histogram[:, :, : i + 1].sum(axis=(1, 2))
        return Confusion(self.histogram.shape[1], np.concatenate([ground[:, None], above], axis=1))

    def mean_iou(self) -> np.ndarray:
        """[T] float64, at every threshold."""
        return np.array([self.confusion(i).mean_iou() for i in range(len(self.thresholds))])

    def best(self) -> tuple[float, Confusion]:
        """The threshold with the highest mean IoU (the lowest of several), found with the masks, and its counts."""
        means = self.mean_iou()
        i = 0 if np.isnan(means).all() else int(np.nanargmax(means))
        return float(self.thresholds[i]), self.confusion(i)


@dataclass
class Evaluation:
    """What came of a split."""

    pictures: int = 0  # evaluated
    without_mask: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # id, reason
    ignored: int = 0  # pixels predicted 255 where the truth is known
    confusion: Confusion = field(default_factory=lambda: Confusion(0))  # label pictures, or maps cut label-free
    sweep: ThresholdSweep | None = None  # of maps


def evaluate_labels(
    pictures: PictureSet,
    folder: Path,
    *,
    skip_ignored: bool = False,
    numbers: Sequence[int] | None = None,
    workers: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Compare label pictures with the set's masks.

    Args:
        pictures: the set; pictures without a mask are counted and left out.
        folder: one `<id>.png` a picture, of the mask's size: 0 background, 1..C, 255 = no decision.
        skip_ignored: leave pixels predicted 255 out; the default counts them as background, as IRNet does.
        numbers: of the pictures to evaluate; None = all. Shards: `range(rank, len(pictures), processes)`.
        workers: threads.
        progress: called after each picture.

    Returns:
        Evaluation: pictures that could not be evaluated are named in `failed`.
    """
    size = len(pictures.classes) + 1

    def count(i: int, truth: np.ndarray) -> tuple[np.ndarray, int]:
        path = inside(folder, pictures.ids[i], ".png")
        prediction = read_mask(path, num_classes=size - 1)
        _check_size(path, prediction.shape, truth)
        undecided = (prediction == IGNORE) & (truth != IGNORE)
        if skip_ignored:
            truth = np.where(undecided, IGNORE, truth)
        return _pair_counts(truth, np.where(undecided, 0, prediction), size), int(undecided.sum())

    result = Evaluation(confusion=Confusion(size - 1))
    for counts, ignored in _each(pictures, numbers, workers, count, result, progress):
        result.confusion.counts += counts
        result.ignored += ignored
    return result


def evaluate_maps(
    pictures: PictureSet,
    folder: Path,
    *,
    thresholds: Sequence[float] | None = None,
    normalize: str = "image",
    numbers: Sequence[int] | None = None,
    workers: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Compare score maps with the set's masks: at every threshold, and at each picture's label-free one.

    Args:
        pictures: the set; pictures without a mask are counted and left out.
        folder: one `<id>.npz` a picture (`files.read_maps`), of any stride: brought to the mask's size bilinearly
            (align_corners=False), by area averaging where they are larger. Negative scores count as 0.
        thresholds: of the background, ascending, in 0..1; None = 100 from 0 to 0.99.
        normalize: "image": each picture's maps are divided by their maximum; "class": each map by its own, as
            published pipelines do; "none".
        numbers, workers, progress: as in `evaluate_labels`.

    Returns:
        Evaluation: `sweep` holds the thresholds, whose best is an oracle's (chosen with the masks); `confusion` the
        labels of `labels_from_maps(maps)`, whose threshold is found from each picture's maps alone.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    num_classes = len(pictures.classes)
    sweep = ThresholdSweep(num_classes, thresholds)

    def count(i: int, truth: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        class_ids, cams = read_maps(inside(folder, pictures.ids[i], ".npz"), num_classes=num_classes)
        maps = _to_size(_normalized(torch.from_numpy(cams).clamp_min(0), normalize), truth.shape)
        found = wk.labels_from_maps(maps, class_ids=class_ids.tolist())  # all background without a class
        assert isinstance(found, Tensor)  # a tensor in, a tensor out
        return sweep.count(truth, class_ids, maps), _pair_counts(truth, found.numpy(), num_classes + 1)

    result = Evaluation(confusion=Confusion(num_classes), sweep=sweep)
    for counted, label_free in _each(pictures, numbers, workers, count, result, progress):
        sweep.add_counts(counted)
        result.confusion.counts += label_free
    return result


def summed_over_processes(counts: np.ndarray) -> np.ndarray:
    """int64 counts summed over the processes of torch.distributed; as they are where it is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.from_numpy(counts).to(device, copy=True)
    dist.all_reduce(total)
    return total.cpu().numpy()


def _each(
    pictures: PictureSet,
    numbers: Sequence[int] | None,
    workers: int,
    count: Callable[[int, np.ndarray], T],
    result: Evaluation,
    progress: Callable[[], None],
) -> Iterator[T]:
    """What `count` makes of each picture and its mask, read by a few threads; failures and gaps go to `result`."""

    def work(i: int) -> T | None:
        truth = pictures.mask(i)
        return None if truth is None else count(i, truth)

    left = iter(range(len(pictures)) if numbers is None else numbers)
    waiting: list[tuple[int, Future[T | None]]] = []
    with ThreadPoolExecutor(workers) as pool:
        while True:
            waiting += [(i, pool.submit(work, i)) for i in islice(left, 2 * workers - len(waiting))]
            if not waiting:
                return
            i, future = waiting.pop(0)
            try:
                counted = future.result()
            except _OF_THE_PICTURE as error:
                result.failed.append((pictures.ids[i], str(error) or "not enough memory"))
            else:
                if counted is None:
                    result.without_mask += 1
                else:
                    result.pictures += 1
                    yield counted
            progress()


def _pair_counts(truth: np.ndarray, prediction: np.ndarray, size: int) -> np.ndarray:
    """[size, size] int64 pixels by true and predicted class, those with truth 255 left out."""
    _same_shape(truth.shape, prediction.shape)
    counted = truth != IGNORE
    true, predicted = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, values in (("truth", true), ("prediction", predicted)):
        if len(values) and not 0 <= values.min() <= values.max() < size:
            raise ValueError(f"{name} must be in 0..{size - 1}, got {values.min()}..{values.max()}")
    return np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)


def _same_shape(truth: tuple[int, ...], prediction: tuple[int, ...]) -> tuple[int, ...]:
    if truth != prediction:
        raise ValueError(f"prediction must have the truth's shape {truth}, got {prediction}")
    return truth


def _check_size(path: Path, shape: tuple[int, ...], truth: np.ndarray) -> None:
    if shape != truth.shape:
        raise FileError(
            path, f"must have the mask's size {truth.shape[0]} x {truth.shape[1]}, got {shape[0]} x {shape[1]}"
        )


def _normalized(maps: Tensor, normalize: str) -> Tensor:
    if normalize == "none" or not maps.numel():
        return maps
    peak = maps.amax() if normalize == "image" else maps.amax(dim=(1, 2), keepdim=True)
    return maps / torch.where(peak > 0, peak, torch.ones_like(peak))


def _to_size(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    height, width = size
    if not len(maps):
        return maps.new_zeros(0, height, width)
    smaller = average_to(maps, (min(maps.shape[-2], height), min(maps.shape[-1], width)))
    return F.interpolate(smaller[None], (height, width), mode="bilinear", align_corners=False)[0]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.true_divide(part, whole)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
