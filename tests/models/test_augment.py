"""Augmentations: the published geometry, picture and maps alike, the same draws in any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from torch.utils.data import DataLoader
from wsss_models.data import open_dataset
from wsss_models.data.artefacts import FileError
from wsss_models.data.augment import CAFFE_BGR, CAFFE_RGB, IMAGENET, Augment, colour_jitter, generator
from wsss_models.data.samples import Samples
from wsss_models.data.synth import Settings, write_set

RNG = np.random.default_rng(0)
NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("set") / "synth"
    write_set(root, Settings(12, classes=3, seed=1, height=48, width=64, val=0.25))
    return open_dataset(root)


def ramp(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture whose red value is the mask's id."""
    mask = np.arange(height * width).reshape(height, width) % 200
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8)
    return image, mask.astype(np.uint8)


def red(crop: torch.Tensor) -> np.ndarray:
    return IMAGENET.undo(crop)[..., 0]


def test_normalisations_by_hand():
    pixel = np.array([[[255, 0, 124]]], dtype=np.uint8)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (124 / 255 - 0.406) / 0.225]
    assert IMAGENET(pixel).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert CAFFE_RGB(pixel).flatten().tolist() == [131, -117, 20]
    assert CAFFE_BGR(pixel).flatten().tolist() == pytest.approx([124 - 104.008, -116.669, 255 - 122.675], abs=1e-4)
    for normalisation in (IMAGENET, CAFFE_RGB, CAFFE_BGR):
        assert np.array_equal(normalisation.undo(normalisation(pixel)), pixel)


@pytest.mark.parametrize("height, width, size", [(9, 11, 6), (9, 11, 20), (9, 30, 12), (30, 9, 12), (12, 12, 12)])
@pytest.mark.parametrize("black", [False, True])
def test_a_crop_is_a_window_or_lies_in_a_container(height, width, size, black):
    image, mask = ramp(height, width)
    augment = Augment(crop=size, flip=False, black_padding=black)
    offsets = set()
    for seed in range(60):
        crop, maps = augment(image, {"mask": mask, "score": mask[None].astype(np.float32)}, generator(seed, 0, 0))
        assert crop.shape == (3, size, size)
        assert crop.dtype == torch.float32
        found = maps["mask"].numpy()
        inside = found != 255
        assert inside.sum() == min(size, height) * min(size, width)
        assert np.array_equal(red(crop)[inside], found[inside])
        assert np.array_equal(maps["score"][0].numpy()[inside], found[inside])
        assert (maps["score"][0].numpy()[~inside] == 0).all()
        padding = crop[:, torch.from_numpy(~inside)]
        expected = IMAGENET(np.zeros((1, 1, 3), dtype=np.uint8)).view(3, 1) if black else torch.zeros(3, 1)
        assert torch.equal(padding, expected.expand_as(padding))
        ys, xs = np.nonzero(inside)
        first = found[ys[0], xs[0]]
        assert np.array_equal(
            found[inside].reshape(min(size, height), -1)[0], np.arange(first, first + min(size, width))
        )
        offsets.add((ys[0], xs[0], first))
    assert (len(offsets) > 10) == ((height, width) != (size, size))


def test_flips_are_shared_and_half_of_the_draws():
    image, mask = ramp(4, 5)
    flipped = 0
    for seed in range(200):
        crop, maps = Augment()(image, {"mask": mask}, generator(seed, 0, 0))
        assert np.array_equal(red(crop), maps["mask"].numpy())
        mirrored = np.array_equal(maps["mask"].numpy(), mask[:, ::-1])
        assert mirrored or np.array_equal(maps["mask"].numpy(), mask)
        flipped += mirrored
    assert 70 < flipped < 130


def test_the_longer_side_takes_every_length_of_its_range():
    image = np.zeros((30, 20, 3), dtype=np.uint8)
    shapes = {tuple(Augment(long_side=(15, 18))(image, {}, generator(s, 0, 0))[0].shape[1:]) for s in range(80)}
    assert shapes == {(15, 10), (16, 11), (17, 11), (18, 12)}


def test_scales_stay_in_their_range():
    image = np.zeros((40, 20, 3), dtype=np.uint8)
    heights = [Augment(scale=(0.5, 1.5))(image, {}, generator(s, 0, 0))[0].shape[1] for s in range(200)]
    assert 20 <= min(heights) < 23
    assert 57 < max(heights) <= 60


def test_maps_are_resampled_to_the_nearest_as_pillow_does_and_scores_bilinearly():
    mask = RNG.integers(0, 21, (23, 31)).astype(np.uint8)
    image = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
    for long in (12, 31, 45):
        maps = {"mask": mask, "score": mask[None].astype(np.float64)}
        crop, done = Augment(long_side=(long, long), flip=False)(image, maps, generator(0, 0, 0))
        size = (crop.shape[2], crop.shape[1])
        assert done["mask"].dtype == torch.int64
        assert np.array_equal(
            done["mask"].numpy(), np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        )
        bilinear = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(done["score"][0].numpy(), np.asarray(bilinear))
        bicubic = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        assert np.array_equal(IMAGENET.undo(crop), bicubic)


def test_jitter_of_nothing_changes_nothing():
    image = RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    assert np.array_equal(colour_jitter(image, generator(0, 0, 0), *NO_JITTER), image)


def test_jitter_by_its_formulas():
    """One step at a time; the factor is the first draw."""
    image = RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    grey = (image @ (0.299, 0.587, 0.114))[..., None]
    for seed in range(20):
        factors = generator(seed, 0, 0).uniform((0.6,) * 3, (1.4,) * 3)
        for step, base in enumerate((0.0, np.rint(grey.mean()), grey)):
            ranges = [0.4 if k == step else 0.0 for k in range(3)]
            draws = generator(seed, 0, 0).uniform([1 - r for r in ranges], [1 + r for r in ranges])
            assert draws[step] == factors[step]
            expected = np.clip(base + factors[step] * (image - base), 0, 255)
            found = colour_jitter(image, generator(seed, 0, 0), *ranges, 0.0)
            assert np.abs(found - expected).max() <= 1.6


def test_jitter_turns_hues():
    """Hue leaves the brightest and the darkest channel as they are, and takes pure red anywhere on the circle."""
    image = RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    red_only = np.zeros((1, 1, 3), dtype=np.uint8)
    red_only[..., 0] = 255
    brightest = set()
    for seed in range(40):
        turned = colour_jitter(image, generator(seed, 0, 0), 0.0, 0.0, 0.0, 0.5).astype(int)
        assert np.abs(turned.max(-1) - image.max(-1)).max() <= 1
        assert np.abs(turned.min(-1) - image.min(-1).astype(int)).max() <= 3  # 8 bits of saturation
        brightest.add(int(colour_jitter(red_only, generator(seed, 0, 0), 0.0, 0.0, 0.0, 0.5).argmax()))
        slightly = colour_jitter(red_only, generator(seed, 0, 0), 0.0, 0.0, 0.0, 0.05)
        assert slightly[0, 0, 0] == 255
        assert slightly[0, 0, 1:].max() <= 0.05 * 6 * 255 + 3
    assert brightest == {0, 1, 2}


def test_maps_of_another_size_are_refused():
    image, mask = ramp(6, 7)
    with pytest.raises(ValueError, match="mask must have the picture's size 6 x 7, got shape"):
        Augment()(image, {"mask": mask.T}, generator(0, 0, 0))
    with pytest.raises(ValueError, match=r"long_side must be \(lo, hi\)"):
        Augment(long_side=(9, 3))
    with pytest.raises(ValueError, match="crop must be at least 1 pixel"):
        Augment(crop=0)


# --- samples ----------------------------------------------------------------------------------------------------------

TRAIN = Augment(crop=40, long_side=(32, 60), jitter=(0.3, 0.3, 0.3, 0.1))


def epochs(samples: Samples, workers: int, first: int, count: int = 2) -> list[dict]:
    loader = DataLoader(samples, batch_size=5, num_workers=workers, persistent_workers=workers > 0)
    batches = []
    for epoch in range(first, first + count):
        samples.set_epoch(epoch)
        batches += list(loader)
    return batches


def equal(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a["id"] == b["id"] and all(torch.equal(a[key], b[key]) for key in ("image", "label", "mask"))
        for a, b in zip(first, second, strict=True)
    )


def test_samples_are_the_same_in_any_number_of_workers_and_after_a_resumption(pictures):
    alone = epochs(Samples(pictures, TRAIN, seed=3, mask=True), 0, 0)
    assert equal(alone, epochs(Samples(pictures, TRAIN, seed=3, mask=True), 2, 0))
    assert equal(alone[3:], epochs(Samples(pictures, TRAIN, seed=3, mask=True), 0, 1, 1))  # epoch 1 alone
    assert not equal(alone[:3], alone[3:])
    assert not equal(alone, epochs(Samples(pictures, TRAIN, seed=4, mask=True), 0, 0))


def test_a_sample(pictures):
    sample = Samples(pictures, mask=True)[2]
    assert sample["id"] == pictures.ids[2]
    assert np.array_equal(IMAGENET.undo(sample["image"]), pictures.image(2))
    assert np.array_equal(sample["mask"].numpy(), pictures.mask(2))
    assert sample["label"].tolist() == pictures.label(2).tolist()
    assert set(Samples(pictures)[0]) == {"image", "label", "id"}
    with pytest.raises(IndexError):
        Samples(pictures)[12]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        Samples(pictures, seed=-1)


def test_samples_with_more(pictures):
    def score(i: int) -> np.ndarray:
        return np.stack([pictures.mask(i) == c for c in (0, 1)]).astype(np.float32)

    def finish(sample: dict) -> dict:
        return {**sample, "total": sample["score"].sum()}

    samples = Samples(
        pictures,
        TRAIN,
        mask=True,
        maps={"score": score},
        extras={"sublabel": lambda i: np.arange(i, i + 4)},
        finish=finish,
    )
    sample = samples[5]
    assert sample["score"].shape == (2, 40, 40)
    assert sample["sublabel"].tolist() == [5, 6, 7, 8]
    assert sample["total"] == sample["score"].sum()
    inside = sample["mask"] != 255
    agree = (sample["score"][0] > 0.5)[inside] == (sample["mask"] == 0)[inside]
    assert agree.float().mean() > 0.95  # nearest against bilinear: they differ along edges


def test_a_damaged_picture_is_named_from_a_worker_too(tmp_path):
    write_set(tmp_path / "s", Settings(4, classes=3, height=48, width=48))
    pictures = open_dataset(tmp_path / "s")
    pictures.image_path(1).write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"synth_000001\.png: no picture"):
        Samples(pictures)[1]
    with pytest.raises(Exception, match=r"synth_000001\.png: no picture"):
        list(DataLoader(Samples(pictures), num_workers=1))
    (tmp_path / "s" / "SegmentationClass" / "synth_000000.png").unlink()
    with pytest.raises(FileError, match=r"synth_000000\.png: no mask of this picture"):
        Samples(pictures, mask=True)[0]
