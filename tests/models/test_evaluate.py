"""Evaluation: counts by hand, by other libraries, by a loop; every threshold as if it were the only one."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
from wsss_models.data import open_dataset
from wsss_models.data.files import write_label, write_maps
from wsss_models.data.synth import Settings, write_set
from wsss_models.evaluate import Confusion, ThresholdSweep, evaluate_labels, evaluate_maps

import wsss_kernels as wk

RNG = np.random.default_rng(0)


def labels(classes: int, *shape: int, ignored: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    truth = RNG.integers(0, classes + 1, shape).astype(np.uint8)
    prediction = np.where(RNG.random(shape) < 0.6, truth, RNG.integers(0, classes + 1, shape)).astype(np.uint8)
    truth[RNG.random(shape) < ignored] = 255
    return truth, prediction


# --- counts -----------------------------------------------------------------------------------------------------------


def test_by_hand():
    counts = Confusion(3)
    counts.add(np.array([[0, 0, 1, 1, 255], [2, 2, 2, 0, 255]]), np.array([[0, 1, 1, 1, 3], [2, 0, 1, 0, 77]]))
    assert counts.counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert counts.iou()[:3].tolist() == [2 / 4, 2 / 4, 1 / 3]
    assert np.isnan(counts.iou()[3])
    assert counts.mean_iou() == pytest.approx((0.5 + 0.5 + 1 / 3) / 3)
    assert counts.precision()[:3].tolist() == [2 / 3, 2 / 4, 1]
    assert counts.recall()[:3].tolist() == [2 / 3, 1, 1 / 3]
    assert counts.pixel_accuracy() == 5 / 8
    assert counts.counts.dtype == np.int64


@pytest.mark.parametrize("classes", [1, 5, 20, 254])
def test_against_a_loop(classes):
    truth, prediction = labels(classes, 13, 17)
    counts = Confusion(classes)
    counts.add(truth, prediction)
    expected = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t != 255:
            expected[t, p] += 1
    assert np.array_equal(counts.counts, expected)
    hit = [expected[c, c] / max(1, (expected[c].sum() + expected[:, c].sum() - expected[c, c])) for c in range(classes)]
    assert np.nan_to_num(counts.iou())[:classes].tolist() == pytest.approx(hit)


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    counts, truths, predictions = Confusion(20), [], []
    for _ in range(5):
        truth, prediction = labels(20, 31, 29)
        counts.add(truth, prediction)
        truths.append(truth.ravel())
        predictions.append(prediction.ravel())
    truth, prediction = np.concatenate(truths), np.concatenate(predictions)
    known = truth != 255
    expected = metrics.confusion_matrix(truth[known], prediction[known], labels=range(21))
    assert np.array_equal(counts.counts, expected)
    jaccard = metrics.jaccard_score(truth[known], prediction[known], labels=range(21), average=None)
    assert counts.iou() == pytest.approx(jaccard, abs=1e-12)
    assert counts.mean_iou() == pytest.approx(jaccard.mean(), abs=1e-12)
    precision, recall, _, _ = metrics.precision_recall_fscore_support(truth[known], prediction[known], labels=range(21))
    assert counts.precision() == pytest.approx(precision, abs=1e-12)
    assert counts.recall() == pytest.approx(recall, abs=1e-12)


def test_against_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    each = classification.MulticlassJaccardIndex(21, average=None, ignore_index=255)
    mean = classification.MulticlassJaccardIndex(21, average="macro", ignore_index=255)
    matrix = classification.MulticlassConfusionMatrix(21, ignore_index=255)
    counts = Confusion(20)
    for _ in range(4):
        truth, prediction = labels(14, 31, 29)  # classes 15..20 are nowhere
        counts.add(truth, prediction)
        pair = torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
        for metric in (each, mean, matrix):
            metric.update(*pair)
    assert np.array_equal(counts.counts, matrix.compute().numpy())
    assert np.nan_to_num(counts.iou()) == pytest.approx(each.compute().numpy(), abs=1e-6)
    assert counts.mean_iou() == pytest.approx(float(mean.compute()), abs=1e-6)


def test_shards_add_up():
    pairs = [labels(6, 9, 11) for _ in range(10)]
    whole = Confusion(6)
    for pair in pairs:
        whole.add(*pair)
    for n in (1, 2, 3, 4):
        shards = []
        for rank in range(n):
            shard = Confusion(6)
            for pair in pairs[rank::n]:
                shard.add(*pair)
            shards.append(shard)
        total = sum(shards[1:], start=shards[0])
        assert np.array_equal(total.counts, whole.counts)
        again = Confusion(6)
        for shard in shards:
            again += shard
        assert np.array_equal(again.counts, whole.counts)


def test_nothing_counted_is_nan_not_an_error():
    counts = Confusion(2)
    counts.add(np.full((3, 3), 255), np.zeros((3, 3), dtype=np.uint8))
    counts.add(np.zeros((0, 3), dtype=np.uint8), np.zeros((0, 3), dtype=np.uint8))
    assert np.isnan(counts.mean_iou())
    assert np.isnan(counts.iou()).all()
    assert np.isnan(counts.pixel_accuracy())


def test_what_is_refused():
    counts = Confusion(2)
    ones = np.ones((2, 2), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"prediction must have the truth's shape \(2, 2\), got \(2, 3\)"):
        counts.add(ones, np.ones((2, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"prediction must be in 0\.\.2, got 1\.\.3"):
        counts.add(ones, np.array([[1, 2], [3, 1]]))
    with pytest.raises(ValueError, match=r"truth must be in 0\.\.2, got -1\.\.1"):
        counts.add(np.array([[-1, 0], [1, 1]]), ones)
    with pytest.raises(ValueError, match=r"counts must be \[3, 3\]"):
        Confusion(2, np.zeros((2, 2)))
    assert counts.counts.sum() == 0
    with pytest.raises(ValueError, match="thresholds must be one or more ascending numbers"):
        ThresholdSweep(2, [0.5, 0.5])


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, present", [(1, 1), (5, 3), (20, 2), (80, 0)])
def test_a_sweep_is_every_threshold_alone(classes, present):
    """labels_from_maps at each threshold, scores equal to thresholds included."""
    sweep = ThresholdSweep(classes)
    alone = [Confusion(classes) for _ in sweep.thresholds]
    for _ in range(3):
        truth, _ = labels(classes, 19, 23)
        ids = RNG.permutation(classes)[:present] + 1
        maps = torch.from_numpy(RNG.random((present, 19, 23)).astype(np.float32))
        maps[:, :9] = (maps[:, :9] * 100).round() / 100  # ties between classes, and with the thresholds
        sweep.add(truth, ids, maps)
        for threshold, counts in zip(sweep.thresholds, alone, strict=True):
            found = wk.labels_from_maps(maps, background=float(threshold), class_ids=ids.tolist()).numpy()
            counts.add(truth, found)
    for i, counts in enumerate(alone):
        assert np.array_equal(sweep.confusion(i).counts, counts.counts), sweep.thresholds[i]
    means = [counts.mean_iou() for counts in alone]
    assert sweep.mean_iou().tolist() == means
    threshold, best = sweep.best()
    assert best.mean_iou() == max(means)
    assert threshold == sweep.thresholds[means.index(max(means))]


def test_sweeps_add_up_and_refuse_what_confusion_refuses():
    whole, first, second = (ThresholdSweep(3, [0.2, 0.6]) for _ in range(3))
    for k in range(4):
        truth, _ = labels(3, 7, 8)
        maps = torch.rand(2, 7, 8)
        for sweep in (whole, (first, second)[k % 2]):
            sweep.add(truth, np.array([3, 1]), maps)
    first += second
    assert np.array_equal(first.histogram, whole.histogram)
    with pytest.raises(ValueError, match="thresholds must be the same"):
        first += ThresholdSweep(3, [0.2])
    with pytest.raises(ValueError, match=r"class_ids must be in 1\.\.3, got \[4, 1\]"):
        first.add(truth, np.array([4, 1]), maps)
    with pytest.raises(ValueError, match=r"truth must be in 0\.\.3 or 255, got 1\.\.9"):
        first.add(np.array([[1, 9]]), np.array([1]), torch.rand(1, 1, 2))
    with pytest.raises(ValueError, match="prediction must have the truth's shape"):
        first.add(truth, np.array([1]), torch.rand(1, 3, 3))


# --- a set ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set, coarse maps of it with leaks, and its masks with a stripe of background and one of 255."""
    root = tmp_path_factory.mktemp("evaluate")
    write_set(root / "set", Settings(10, classes=4, seed=3, height=48, width=64))
    pictures = open_dataset(root / "set")
    for i, name in enumerate(pictures.ids):
        mask, ids = pictures.mask(i), pictures.class_ids(i)
        exact = torch.from_numpy(np.stack([mask == c for c in ids]).astype(np.float32))
        maps = F.avg_pool2d(exact[None], 8)[0].numpy() + 0.1 * RNG.random((len(ids), 6, 8)).astype(np.float32)
        write_maps(root / "cams" / f"{name}.npz", np.array(ids), 7 * maps)
        label = mask.copy()
        label[10:20], label[30:40] = 0, 255
        write_label(root / "labels" / f"{name}.png", label)
    return root, pictures


def test_labels_of_a_set(made):
    root, pictures = made
    background, skipped = Confusion(4), Confusion(4)
    for i in range(10):
        truth = pictures.mask(i)
        found = truth.copy()
        found[10:20], found[30:40] = 0, 0
        background.add(truth, found)
        truth[30:40] = 255
        skipped.add(truth, found)
    result = evaluate_labels(pictures, root / "labels", workers=3)
    assert np.array_equal(result.confusion.counts, background.counts)
    assert (result.pictures, result.without_mask, result.failed) == (10, 0, [])
    assert result.ignored == 10 * 10 * 64
    assert np.array_equal(
        evaluate_labels(pictures, root / "labels", skip_ignored=True).confusion.counts, skipped.counts
    )
    perfect = evaluate_labels(pictures, root / "set" / "SegmentationClass").confusion
    assert perfect.mean_iou() == 1


@pytest.mark.parametrize("normalize", ["image", "class", "none"])
def test_maps_of_a_set(made, normalize):
    root, pictures = made
    result = evaluate_maps(pictures, root / "cams", normalize=normalize, workers=2)
    free, at_half = Confusion(4), Confusion(4)
    for i, name in enumerate(pictures.ids):
        with np.load(root / "cams" / f"{name}.npz") as npz:
            maps, ids = torch.from_numpy(npz["cams"].astype(np.float32)), npz["class_ids"].tolist()
        if normalize == "image":
            maps = maps / maps.max()
        if normalize == "class":
            maps = maps / maps.amax((1, 2), keepdim=True)
        maps = F.interpolate(maps[None], (48, 64), mode="bilinear", align_corners=False)[0]
        free.add(pictures.mask(i), wk.labels_from_maps(maps, class_ids=ids).numpy())
        at_half.add(pictures.mask(i), wk.labels_from_maps(maps, background=0.5, class_ids=ids).numpy())
    assert np.array_equal(result.confusion.counts, free.counts)
    assert np.array_equal(result.sweep.confusion(50).counts, at_half.counts)
    threshold, best = result.sweep.best()
    assert best.mean_iou() >= result.sweep.mean_iou()[50]
    if normalize == "image":
        assert 0.2 < threshold < 0.8
        assert best.mean_iou() > 0.8


def test_the_oracle_is_never_below_a_fixed_threshold(made):
    root, pictures = made
    result = evaluate_maps(pictures, root / "cams", thresholds=[0.1, 0.4, 0.7])
    assert result.sweep.best()[1].mean_iou() == max(result.sweep.mean_iou())


def test_shards_of_a_set_add_up(made):
    root, pictures = made
    whole = evaluate_maps(pictures, root / "cams")
    for n in (2, 3, 4):
        shards = [evaluate_maps(pictures, root / "cams", numbers=range(rank, 10, n)) for rank in range(n)]
        assert sum(shard.pictures for shard in shards) == 10
        total = shards[0]
        for shard in shards[1:]:
            total.sweep += shard.sweep
            total.confusion += shard.confusion
        assert np.array_equal(total.sweep.histogram, whole.sweep.histogram)
        assert np.array_equal(total.confusion.counts, whole.confusion.counts)


def test_what_fails_is_named_and_the_rest_counted(made, tmp_path):
    _, pictures = made
    good, few = pictures.ids[0], pictures.subset(range(5))
    write_label(tmp_path / f"{good}.png", few.mask(0))
    write_label(tmp_path / f"{pictures.ids[1]}.png", np.zeros((5, 5), dtype=int))
    write_label(tmp_path / f"{pictures.ids[2]}.png", np.full((48, 64), 9))
    (tmp_path / f"{pictures.ids[3]}.png").write_bytes(b"")
    result = evaluate_labels(few, tmp_path)
    assert result.pictures == 1
    reasons = dict(result.failed)
    assert "must have the mask's size 48 x 64, got 5 x 5" in reasons[pictures.ids[1]]
    assert "mask must hold 0..4 and 255, got 9" in reasons[pictures.ids[2]]
    assert "the file is empty" in reasons[pictures.ids[3]]
    assert f"{pictures.ids[4]}.png: No such file" in reasons[pictures.ids[4]]
    with pytest.raises(ValueError, match="normalize must be one of image, class, none, got 'both'"):
        evaluate_maps(pictures, tmp_path, normalize="both")


def test_maps_without_a_class_are_background(made, tmp_path):
    _, pictures = made
    write_maps(tmp_path / f"{pictures.ids[0]}.npz", np.zeros(0, dtype=int), np.zeros((0, 3, 3)))
    result = evaluate_maps(pictures.subset([0]), tmp_path)
    assert result.pictures == 1
    assert result.confusion.counts[:, 1:].sum() == 0
    assert result.sweep.confusion(0).counts[:, 1:].sum() == 0
    assert result.confusion.counts.sum() == 48 * 64


def test_maps_larger_than_the_mask_are_averaged(made, tmp_path):
    _, pictures = made
    mask, ids = pictures.mask(0), pictures.class_ids(0)
    maps = np.stack([mask == c for c in ids]).repeat(2, axis=1).repeat(2, axis=2).astype(np.float32)
    write_maps(tmp_path / f"{pictures.ids[0]}.npz", np.array(ids), maps)
    assert evaluate_maps(pictures.subset([0]), tmp_path).sweep.best()[1].mean_iou() == 1


def _count_a_share(rank: int, world: int, folder: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    pictures = open_dataset(f"{folder}/set")
    result = evaluate_maps(pictures, folder / "cams", numbers=range(rank, len(pictures), world))
    result.confusion.all_reduce()
    result.sweep.all_reduce()
    np.savez(f"{out}/{rank}.npz", counts=result.confusion.counts, histogram=result.sweep.histogram)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_three_processes_count_what_one_counts(made, tmp_path):
    """10 pictures over 3 processes: none twice, as a padding sampler would have it."""
    root, pictures = made
    whole = evaluate_maps(pictures, root / "cams")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count_a_share, args=(rank, 3, root, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(3):
        with np.load(tmp_path / f"{rank}.npz") as npz:
            assert np.array_equal(npz["counts"], whole.confusion.counts)
            assert np.array_equal(npz["histogram"], whole.sweep.histogram)
