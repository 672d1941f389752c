"""mask_vote against NumPy in float64."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import wsss_kernels
from wsss_kernels import _dispatch, reference

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (1, 5, 40, 53), (3, 2, 1, 8), (2, 1, 8, 1), (1, 2, 130, 127), (1, 21, 9, 200)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def superpixels(batch: int, height: int, width: int, size: int = 4, seed: int = 0) -> Tensor:
    """Ragged blocks, some of them no segment."""
    noise = (3 * rand(2, batch, height, width, seed=seed)).long()
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (ys + noise[0]) // size * (width // size + 2) + (xs + noise[1]) // size - 2


def masks_of(counts: list[int], height: int, width: int, seed: int = 0) -> list[Tensor]:
    """Overlapping boxes and noise."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for count in counts:
        masks = torch.rand(count, height, width, generator=generator) > 0.8
        for mask in masks[::2]:
            y, x = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
            mask[y : y + height // 2 + 1, x : x + width // 3 + 1] = True
        out.append(masks)
    return out


def oracle(maps: Tensor, segments: Tensor | list[Tensor], reduce: str = "mean") -> Tensor:
    score = np.mean if reduce == "mean" else np.max
    x, out = maps.double().cpu().numpy(), maps.double().cpu().numpy().copy()
    for b in range(len(x)):
        image = segments[b].cpu().numpy()
        for c in range(x.shape[1]):
            if image.dtype != bool:
                for label in np.unique(image[image >= 0]):
                    out[b, c][image == label] = score(x[b, c][image == label])
                continue
            scores = [score(x[b, c][mask]) if mask.any() else None for mask in image]
            for y, column in np.argwhere(image.any(0)) if len(image) else []:
                out[b, c, y, column] = score([s for s, mask in zip(scores, image, strict=True) if mask[y, column]])
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_superpixels(wk, nan_filled, assert_close, shape, reduce):
    batch, _, height, width = shape
    maps = rand(*shape, seed=1) - 0.2
    for size in (2, 9, 500):
        segments = superpixels(batch, height, width, size)
        out = wk.mask_vote(maps, segments, reduce=reduce)
        assert out.is_contiguous() and out.dtype == torch.float32
        expected = oracle(maps, segments, reduce)
        assert_close(out, expected)
        assert_close(reference.mask_vote(maps, segments, reduce=reduce), expected)
        assert_close(wk.mask_vote(maps.double(), segments, reduce=reduce), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_masks(wk, nan_filled, assert_close, shape, reduce):
    batch, _, height, width = shape
    maps, masks = rand(*shape, seed=1) - 0.2, masks_of([3, 0, 7][:batch], height, width)
    masks[0][1] = False  # an empty one
    out, expected = wk.mask_vote(maps, masks, reduce=reduce), oracle(maps, masks, reduce)
    assert out.is_contiguous() and out.dtype == torch.float32
    assert_close(out, expected)
    assert_close(reference.mask_vote(maps, masks, reduce=reduce), expected)
    assert_close(wk.mask_vote(maps.double(), masks, reduce=reduce), expected)


def test_by_hand(wk):
    maps = torch.tensor([[[[1.0, 3.0, 8.0], [2.0, 0.0, 4.0]]]])
    segments = torch.tensor([[[5, 5, -1], [9, 5, 9]]])
    assert wk.mask_vote(maps, segments).flatten().tolist() == pytest.approx([4 / 3, 4 / 3, 8, 3, 4 / 3, 3])
    assert wk.mask_vote(maps, segments, reduce="max").flatten().tolist() == [3, 3, 8, 4, 3, 4]
    left, top = torch.tensor([[[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]]).bool()
    # left holds 1 and 2: 1.5; top holds 1 and 3: 2; the corner hears both: 1.75
    assert wk.mask_vote(maps, [torch.stack([left, top])]).flatten().tolist() == [1.75, 2, 8, 1.5, 0, 4]
    assert wk.mask_vote(maps, [torch.stack([left, top])], reduce="max").flatten().tolist() == [3, 3, 8, 2, 0, 4]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_types(wk, assert_close, dtype):
    maps, segments = rand(2, 3, 11, 13), superpixels(2, 11, 13, 3).clamp(max=100).to(dtype)
    assert_close(wk.mask_vote(maps, segments), oracle(maps, segments))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("spread", ["all", "sparse", "single"])
def test_ids_of_any_size(wk, assert_close, dtype, spread):
    """From one end of the type to the other, in no order."""
    largest = torch.iinfo(dtype).max
    ids = {
        "all": torch.tensor([largest, 0, largest - 1, 5, torch.iinfo(dtype).min, -1]),
        "sparse": torch.tensor([largest, largest // 3, 7]),
        "single": torch.tensor([largest]),
    }[spread].to(dtype)
    index = torch.randint(len(ids), (2, 20, 31), generator=torch.Generator().manual_seed(0))
    maps, segments = rand(2, 2, 20, 31), ids[index]
    assert_close(wk.mask_vote(maps, segments), oracle(maps, segments))


def test_every_pixel_its_own_segment(wk):
    maps = rand(2, 3, 90, 101)
    segments = torch.stack([torch.randperm(9090, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.equal(wk.mask_vote(maps, segments.view(2, 90, 101)), maps)
    assert torch.equal(wk.mask_vote(maps, torch.full((2, 90, 101), -1)), maps)
    assert torch.equal(wk.mask_vote(maps, [torch.zeros(0, 90, 101, dtype=torch.bool)] * 2), maps)


def test_voting_twice_changes_nothing(wk):
    maps, segments = rand(1, 3, 60, 70), superpixels(1, 60, 70, 8)
    once = wk.mask_vote(maps, segments)
    torch.testing.assert_close(wk.mask_vote(once, segments), once, rtol=1e-6, atol=0)


def test_long_sums_keep_their_precision(wk):
    """A segment of a million pixels, values far from zero."""
    maps = 1000 + rand(1, 1, 1000, 1000)
    out = wk.mask_vote(maps, torch.zeros(1, 1000, 1000, dtype=torch.int32))
    assert abs(out.unique().item() - maps.double().mean().item()) < 1e-4
    everything = [torch.ones(2, 1000, 1000, dtype=torch.bool)]
    assert abs(wk.mask_vote(maps, everything).unique().item() - maps.double().mean().item()) < 1e-4


@pytest.mark.native
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_the_number_of_threads_does_not_change_a_bit(reduce):
    before = torch.get_num_threads()
    cases = [((1, 1, 375, 500), 19), ((2, 5, 200, 333), 7), ((1, 3, 100, 100), 1000), ((1, 20, 130, 131), 1)]
    try:
        results: list[list[Tensor]] = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append([])
            for shape, size in cases:
                batch, _, height, width = shape
                maps = rand(*shape, seed=2)
                masks = masks_of([4] * batch, height, width)
                results[-1] += [
                    wsss_kernels.mask_vote(maps, superpixels(batch, height, width, size), reduce=reduce),
                    wsss_kernels.mask_vote(maps, masks, reduce=reduce),
                ]
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


@pytest.mark.native
def test_batch_and_classes_do_not_change_a_bit():
    maps, segments = rand(3, 4, 99, 120), superpixels(3, 99, 120, 6)
    together = wsss_kernels.mask_vote(maps, segments)
    for b in range(3):
        for c in range(4):
            alone = wsss_kernels.mask_vote(maps[b : b + 1, c : c + 1], segments[b : b + 1])
            assert torch.equal(alone[0, 0], together[b, c])


@pytest.mark.native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa, tmp_path, assert_close):
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(wsss_kernels.info()["cpu"]["isa"]):
        pytest.skip(f"this processor or build has no {isa}")
    inputs = tmp_path / "inputs.pt"
    maps, segments, masks = rand(1, 3, 61, 67), superpixels(1, 61, 67, 7), masks_of([4], 61, 67)
    torch.save([maps, segments, masks], inputs)
    script = f"""
import torch, wsss_kernels as wk
assert wk.info()["cpu"]["isa"] == {isa!r}
maps, segments, masks = torch.load({str(inputs)!r})
out = [wk.mask_vote(maps, given, reduce=reduce) for given in (segments, masks) for reduce in ("mean", "max")]
torch.save(out, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"WSSS_CPU_ISA": isa}, check=True)
    wanted = [oracle(maps, given, reduce) for given in (segments, masks) for reduce in ("mean", "max")]
    for out, expected in zip(torch.load(tmp_path / "out.pt"), wanted, strict=True):
        assert_close(out, expected)


def test_dtypes(wk, assert_close, dtype):
    maps, segments = rand(1, 2, 20, 21).to(dtype), superpixels(1, 20, 21)
    out = wk.mask_vote(maps, segments)
    assert out.dtype == dtype
    assert_close(out, oracle(maps, segments))
    assert_close(wk.mask_vote(maps, masks_of([5], 20, 21)), oracle(maps, masks_of([5], 20, 21)))


def test_layouts(wk, layout):
    maps, segments = layout(rand(2, 3, 8, 9)), superpixels(2, 8, 9)
    expected = wk.mask_vote(maps.clone(), segments)
    assert torch.equal(wk.mask_vote(maps, segments), expected)
    turned = segments.mT.contiguous().mT
    assert torch.equal(wk.mask_vote(maps, turned), expected)
    masks = [mask.mT.contiguous().mT for mask in masks_of([3, 2], 8, 9)]
    assert torch.equal(wk.mask_vote(maps, masks), wk.mask_vote(maps.clone(), masks_of([3, 2], 8, 9)))


@pytest.mark.native
def test_bytes_that_are_no_proper_bool():
    """A view of other bytes: whatever is not 0 is set."""
    masks = masks_of([3], 20, 31)[0]
    odd = (masks.to(torch.uint8) * torch.tensor([1, 2, 255], dtype=torch.uint8)[:, None, None]).view(torch.bool)
    maps = rand(1, 2, 20, 31)
    assert torch.equal(wsss_kernels.mask_vote(maps, [odd]), wsss_kernels.mask_vote(maps, [masks]))


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_stay_in_their_segment(wk, reduce, bad):
    maps, segments = rand(2, 3, 30, 31), superpixels(2, 30, 31)
    segments[0, 4:9, 4:9] = 777
    masks = masks_of([4, 4], 30, 31)
    masks[0][:, 6, 6] = torch.tensor([True, False, False, False])
    dirty = maps.clone()
    dirty[0, 1, 6, 6] = bad
    for given in (segments, masks):
        clean, out = wk.mask_vote(maps, given, reduce=reduce), wk.mask_vote(dirty, given, reduce=reduce)
        inside = segments[0] == 777 if given is segments else masks[0][0]
        assert torch.equal(out[1], clean[1]) and torch.equal(out[0, [0, 2]], clean[0, [0, 2]])
        assert torch.equal(out[0, 1][~inside], clean[0, 1][~inside])
        assert torch.equal(out.isnan(), reference.mask_vote(dirty, given, reduce=reduce).isnan())
        if bad != -float("inf") or reduce == "mean":
            assert not out[0, 1][inside].isfinite().any()


def test_constant_for_the_gradient(wk):
    maps = rand(1, 2, 4, 5).requires_grad_()
    assert not wk.mask_vote(maps, superpixels(1, 4, 5)).requires_grad
    assert not wk.mask_vote(maps, masks_of([2], 4, 5)).requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 3, 0)])
def test_empty(wk, shape):
    batch, _, height, width = shape
    assert wk.mask_vote(torch.rand(shape), torch.zeros(batch, height, width, dtype=torch.int64)).shape == shape
    assert wk.mask_vote(torch.rand(shape), [torch.zeros(2, height, width, dtype=torch.bool)] * batch).shape == shape


@pytest.mark.native
@pytest.mark.parametrize("maximum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, maximum, dtype):
    maps, segments = rand(2, 3, 6, 7).to(device, dtype), superpixels(2, 6, 7).to(device)
    masks = [image.to(device) for image in masks_of([3, 0], 6, 7)]
    torch.library.opcheck(torch.ops.wsss_kernels.mask_vote.default, (maps, segments, maximum))
    torch.library.opcheck(torch.ops.wsss_kernels.mask_vote_masks.default, (maps, masks, maximum))


@pytest.mark.native
def test_compiles_as_one_graph(device):
    torch._dynamo.reset()

    def op(maps, segments):
        return wsss_kernels.mask_vote(maps * 2, segments) + 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, channels, height, width in ((1, 2, 5, 7), (2, 3, 4, 6), (1, 2, 8, 8)):
        maps = rand(batch, channels, height, width).to(device)
        segments = superpixels(batch, height, width).to(device)
        masks = [image.to(device) for image in masks_of([2] * batch, height, width)]
        assert torch.equal(compiled(maps, segments), op(maps, segments))
        assert torch.equal(compiled(maps, masks), op(maps, masks))


@pytest.mark.native
def test_refuses_more_pixels_than_it_counts():
    maps = torch.zeros(1).expand(1, 0, 2**16, 2**15)
    with pytest.raises(ValueError, match="maps must have fewer than"):
        wsss_kernels.mask_vote(maps, torch.zeros(1, dtype=torch.int32).expand(1, 2**16, 2**15))


MAPS, SEGMENTS, MASK = rand(1, 2, 3, 4), torch.zeros(1, 3, 4, dtype=torch.int64), torch.zeros(2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": MAPS[0]}, ValueError, "maps must be"),
        ({"maps": MAPS.long()}, TypeError, "maps must be"),
        ({"segments": SEGMENTS[0]}, ValueError, "segments must be an integer tensor"),
        ({"segments": SEGMENTS.float()}, TypeError, "segments must be an integer tensor"),
        ({"segments": MASK}, TypeError, "segments must be an integer tensor"),
        ({"segments": None}, TypeError, "segments must be"),
        ({"segments": "masks"}, TypeError, "segments must be"),
        ({"segments": SEGMENTS.expand(2, -1, -1)}, ValueError, "segments must be of 1 images, as maps is, got 2"),
        ({"segments": SEGMENTS[..., 1:]}, ValueError, r"segments must have the height and width of maps \(3, 4\)"),
        ({"segments": [MASK, MASK]}, ValueError, "segments must be of 1 images"),
        ({"segments": [MASK[0]]}, ValueError, r"segments\[0\] must be a bool tensor"),
        ({"segments": [MASK.long()]}, TypeError, r"segments\[0\] must be a bool tensor"),
        ({"segments": [MASK[:, 1:]]}, ValueError, "segments must have the height and width"),
        ({"reduce": "median"}, ValueError, "reduce must be one of 'mean', 'max'"),
        ({"reduce": None}, TypeError, "reduce must be"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"maps": MAPS, "segments": SEGMENTS, **change}
    with pytest.raises(error, match=message):
        wsss_kernels.mask_vote(arguments.pop("maps"), arguments.pop("segments"), **arguments)


def test_native_kernel_is_used():
    if _dispatch.native is not None:
        assert wsss_kernels.info()["ops"]["mask_vote"]["cpu"]["forward"]["kernel"] == "native"
