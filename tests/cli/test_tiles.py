"""Tiles of large pictures: weights, crops, blending."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wsss_models.tiles import crop_resized, refine_tiles, tile_starts, tile_weights


@pytest.mark.parametrize(
    "length, tile, overlap", [(1, 16, 8), (16, 16, 8), (17, 16, 8), (100, 16, 8), (100, 16, 0), (97, 32, 5)]
)
def test_weights_are_a_partition_of_unity(length, tile, overlap):
    starts, weights = tile_starts(length, tile, overlap), tile_weights(length, tile, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        assert 0 <= start <= length - len(weight)
        assert (weight >= 0).all()
        total[start : start + len(weight)] += weight
    assert torch.allclose(total, torch.ones(length, dtype=torch.float64), atol=1e-6)
    assert all(second - first <= tile - overlap for first, second in itertools.pairwise(starts))


def test_a_crop_is_part_of_the_resized_map():
    maps = torch.rand(2, 5, 7)
    for size in ((40, 33), (3, 4), (5, 7)):
        whole = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        top, left, height, width = size[0] // 3, size[1] // 2, size[0] // 2, size[1] // 3
        part = crop_resized(maps, size, (top, left), (height, width))
        assert torch.allclose(part, whole[:, top : top + height, left : left + width], atol=1e-6)


def test_tiles_that_are_left_as_they_are_give_the_resized_map():
    maps = torch.rand(2, 6, 5)
    out = refine_tiles(maps, (90, 61), lambda part, rows, columns: part, tile=32, overlap=12)
    whole = F.interpolate(maps[None], (90, 61), mode="bilinear", align_corners=False)[0]
    assert out.dtype == np.float16
    assert np.abs(out - (whole / whole.max()).numpy()).max() < 2e-3


def test_empty_tiles_are_skipped_and_nothing_is_nothing():
    maps, seen = torch.zeros(1, 4, 4), []

    def refine(part, rows, columns):
        seen.append((rows.start, columns.start))
        return part

    assert not refine_tiles(maps, (64, 64), refine, tile=16, overlap=0).any()
    assert not seen
    maps[0, 0, 3] = 0.5
    assert refine_tiles(maps, (64, 64), refine, tile=16, overlap=0).max() == 1
    assert (0, 48) in seen and (48, 0) not in seen
