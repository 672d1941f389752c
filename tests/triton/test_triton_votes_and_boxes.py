"""The Triton kernels of mask_vote and of attention_walk's boxes, interpreted on the CPU, against the references."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.reference.attention_walk import region_boxes as expected_boxes
from wsss_kernels.triton import launch, mask_vote, region_boxes

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small maps take several."""
    monkeypatch.setattr(launch, "REGIONS", launch.Configuration(32, {"BLOCK": 16}))
    monkeypatch.setattr(launch, "VOTE_SEGMENTS", launch.Configuration(32, {"CHANNELS": 2, "BLOCK": 8}))
    monkeypatch.setattr(launch, "VOTE_MASKS", launch.Configuration(32, {"CHANNELS": 2, "BLOCK": 16}))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 3, 6, 7), (2, 2, 1, 9), (1, 2, 9, 1), (1, 1, 1, 1), (1, 2, 12, 20)])
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_boxes(shape, density):
    maps = (rand(*shape) < density).float() + 0.1
    assert torch.equal(region_boxes.region_boxes(maps, 0.5), expected_boxes(maps, 0.5))


def test_boxes_of_a_spiral_and_of_odd_values():
    spiral = ["#######", "......#", "#####.#", "#...#.#", "#.###.#", "#.....#", "#######"]
    plane = torch.tensor([[float(c == "#") for c in row] for row in spiral])
    maps = torch.stack([plane, torch.zeros(7, 7), -plane - 1, plane, plane])[None].contiguous()
    maps[0, 3, 3, 3] = float("nan")
    maps[0, 4, 0, 0] = float("inf")
    assert torch.equal(region_boxes.region_boxes(maps, 0.4), expected_boxes(maps, 0.4))


@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_votes_of_segments(assert_close, maximum, dtype):
    maps = rand(2, 3, 5, 9).to(dtype)
    reduce = "max" if maximum else "mean"
    for count, ids in ((4, torch.int32), (30, torch.int64), (1, torch.int64)):
        segments = (count * rand(2, 5, 9, seed=count)).to(ids) - (1 if count > 1 else 0)
        out = mask_vote.segment_vote(maps, segments, maximum)
        assert out.dtype == dtype
        assert_close(out, reference.mask_vote(maps.double(), segments, reduce=reduce))


@pytest.mark.parametrize("maximum", [False, True])
def test_votes_of_masks(assert_close, maximum):
    maps = rand(2, 3, 5, 9)
    masks = [rand(count, 5, 9, seed=count) > 0.7 for count in (3, 0)]
    masks[0][1] = False
    reduce = "max" if maximum else "mean"
    assert_close(mask_vote.mask_vote(maps, masks, maximum), reference.mask_vote(maps.double(), masks, reduce=reduce))


@pytest.mark.parametrize("maximum", [False, True])
def test_nan_stays_in_its_segment(maximum):
    maps, segments = rand(1, 2, 4, 6), (3 * rand(1, 4, 6, seed=1)).int()
    maps[0, 1, 2, 2] = float("nan")
    masks = [torch.stack([segments[0] == 0, segments[0] > 0])]
    reduce = "max" if maximum else "mean"
    for out, given in (
        (mask_vote.segment_vote(maps, segments, maximum), segments),
        (mask_vote.mask_vote(maps, masks, maximum), masks),
    ):
        expected = reference.mask_vote(maps, given, reduce=reduce)
        torch.testing.assert_close(out, expected, equal_nan=True)


def test_empty():
    assert region_boxes.region_boxes(torch.zeros(0, 2, 3, 4), 0.4).shape == (0, 2, 3, 4)
    assert mask_vote.segment_vote(torch.zeros(1, 0, 3, 4), torch.zeros(1, 3, 4).int(), False).shape == (1, 0, 3, 4)
    assert mask_vote.mask_vote(torch.zeros(1, 2, 0, 4), [torch.zeros(2, 0, 4).bool()], False).shape == (1, 2, 0, 4)
