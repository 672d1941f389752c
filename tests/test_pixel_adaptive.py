"""pixel_adaptive: against the float64 reference, the published module re-derived, and its contract."""

import pytest
import torch
import torch.nn.functional as F

import wsss_kernels as wk
from wsss_kernels import reference

VARIANTS = ("pamr", "par")
DILATIONS = ((1, 2, 4, 8, 12, 24), (1,), (3, 100))
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 21, 33, 47), (1, 5, 20, 64), (2, 9, 50, 31), (1, 30, 40, 21), (1, 2, 1, 40))


def scene(batch, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return image, torch.rand(batch, channels, height, width, generator=generator)


def published(image, maps, variant, dilations, iterations):
    """The published modules: a convolution a neighbour, in another order of arithmetic than the reference."""
    kernel = torch.zeros(8, 1, 3, 3, dtype=image.dtype)
    places = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    for k, (y, x) in enumerate(places):
        kernel[k, 0, y, x] = 1

    def gathered(x):
        planes = x.flatten(0, 1).unsqueeze(1)
        near = [F.conv2d(F.pad(planes, (d,) * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
        return torch.cat(near, 1).view(*x.shape[:2], -1, *x.shape[2:])

    near, centre = gathered(image), image.unsqueeze(2)
    if variant == "pamr":
        deviation = torch.cat([near, *[centre] * len(dilations)], 2).std(2, keepdim=True)
        weights = (-(near - centre).abs() / (1e-8 + 0.1 * deviation)).mean(1, keepdim=True).softmax(2)
    else:
        deviation = near.std(2, keepdim=True)
        weights = (-(((near - centre).abs() / (deviation + 1e-8) / 0.3) ** 2)).mean(1, keepdim=True).softmax(2)
        distances = [d * (2**0.5 if y != 1 and x != 1 else 1) for d in dilations for y, x in places]
        steps = torch.tensor(distances, dtype=image.dtype)
        weights = weights + 0.01 * (-((steps / (steps.std() + 1e-8) / 0.3) ** 2)).softmax(0).view(1, 1, -1, 1, 1)
    for _ in range(iterations):
        maps = (gathered(maps) * weights).sum(2)
    return maps


def close(out, right, tol):
    assert (out.double() - right).abs().max() <= tol * right.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dilations", [(1, 2, 4), (2, 5)])
def test_reference_is_the_published_module(variant, dilations):
    image, maps = scene(2, 2, 13, 17)
    right = published(image.double(), maps.double(), variant, dilations, 3)
    out = reference.pixel_adaptive(image, maps.double(), variant=variant, dilations=dilations, iterations=3)
    close(out, right, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dilations", DILATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(device, shape, dilations, variant):
    image, maps = scene(*shape)
    options = {"variant": variant, "dilations": dilations}
    out = wk.pixel_adaptive(image.to(device), maps.to(device), **options).cpu()
    close(out, reference.pixel_adaptive(image, maps.double(), **options), 5e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_tiles_and_groups_of_maps(wk, variant):
    """Rows this far apart fit a cache for few columns only."""
    image, maps = scene(1, 17, 210, 200)
    options = {"variant": variant, "dilations": (1, 190), "iterations": 2}
    close(wk.pixel_adaptive(image, maps, **options), reference.pixel_adaptive(image, maps.double(), **options), 5e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_against_float64(device, shape, variant):
    image, maps = scene(*shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options = {"variant": variant, "iterations": 3}
    x, y = maps.to(device, copy=True).requires_grad_(), maps.double().requires_grad_()
    wk.pixel_adaptive(image.to(device), x, **options).backward(grad.to(device))
    reference.pixel_adaptive(image, y, **options).backward(grad.double())
    close(x.grad.cpu(), y.grad, 5e-5)


def test_gradcheck_of_the_reference():
    image, maps = scene(1, 2, 4, 5)
    maps = maps.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: wk.pixel_adaptive(image, m, dilations=(1, 3), iterations=2), maps)


def test_constants_stay_what_they_are():
    image, _ = scene(1, 1, 30, 50)
    maps = torch.full((1, 2, 30, 50), 0.7)
    assert (wk.pixel_adaptive(image, maps, variant="pamr") - 0.7).abs().max() < 1e-5
    assert (wk.pixel_adaptive(image, maps, variant="par") - 0.7 * 1.01**10).abs().max() < 1e-5


def test_one_neighbour_by_hand():
    """A flat picture but for one column: the pixels left of it see equal neighbours, whose mean they take."""
    image = torch.zeros(1, 3, 1, 3)
    maps = torch.tensor([[[[0.0, 0.0, 1.0]]]])
    out = wk.pixel_adaptive(image, maps, variant="pamr", dilations=(1,), iterations=1)
    assert out.flatten().tolist() == pytest.approx([0, 3 / 8, 5 / 8], abs=1e-5)  # of 8: right column 3, own column 2


@pytest.mark.parametrize("scale, shift", [(1 / 255, 0), (3.0, -400.0)])
def test_only_ratios_of_colours_matter(scale, shift):
    image, maps = scene(1, 2, 20, 24)
    image = image.float()
    close(wk.pixel_adaptive(image * scale + shift, maps), wk.pixel_adaptive(image, maps).double(), 2e-4)


def test_smaller_and_larger_maps_are_resized():
    image, _ = scene(1, 1, 20, 24)
    for size in ((5, 6), (40, 31), (1, 1)):
        maps = torch.rand(1, 2, *size)
        whole = F.interpolate(maps, (20, 24), mode="bilinear", align_corners=True)
        assert torch.equal(wk.pixel_adaptive(image, maps), wk.pixel_adaptive(image, whole))
        assert torch.equal(wk.pixel_adaptive(image, maps, iterations=0), whole)


def test_same_bits_for_any_number_of_threads():
    image, maps = scene(2, 11, 70, 90)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = maps.clone().requires_grad_()
            out = wk.pixel_adaptive(image, x, iterations=3)
            (out * out).sum().backward()
            found.append((out.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_images_of_a_batch_are_their_own():
    image, maps = scene(3, 2, 17, 22)
    out = wk.pixel_adaptive(image, maps)
    for b in range(3):
        assert torch.equal(out[b], wk.pixel_adaptive(image[b : b + 1], maps[b : b + 1])[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_map_and_near_its_colour(value):
    image, maps = scene(2, 2, 30, 40)
    clean = wk.pixel_adaptive(image, maps, iterations=1)
    maps[0, 1, 3, 4] = value
    out = wk.pixel_adaptive(image, maps, iterations=1)
    assert torch.equal(out[0, 0], clean[0, 0]) and torch.equal(out[1], clean[1])
    assert not out[0, 1].isfinite().all()
    coloured = image.float()
    coloured[0, 2, 15, 20] = float("nan")
    out = wk.pixel_adaptive(coloured, torch.ones(2, 2, 30, 40), dilations=(2,), iterations=1)
    lost = out[0, 0].isnan()
    assert lost.sum() == 9 and lost[13:18:2, 18:23:2].all() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    image, maps = scene(1, 3, 12, 15)
    out = wk.pixel_adaptive(image, maps.to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out, wk.pixel_adaptive(image, maps.to(dtype).float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wk.pixel_adaptive(image, maps), wk.pixel_adaptive(image, maps))


def test_views_and_empty():
    image, maps = scene(1, 4, 12, 15)
    out = wk.pixel_adaptive(image, maps)
    stored = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(wk.pixel_adaptive(image.transpose(2, 3).contiguous().transpose(2, 3), stored), out)
    for shape in ((0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 0, 6)):
        image = torch.zeros(shape[0], 3, *shape[2:])
        assert wk.pixel_adaptive(image, torch.zeros(shape)).shape == shape


def test_opcheck_and_compile():
    image, maps = scene(1, 2, 9, 11)
    maps.requires_grad_()
    torch.library.opcheck(torch.ops.wsss_kernels.pixel_adaptive, (image.float(), maps, True, [1, 2], 2))
    compiled = torch.compile(lambda i, m: wk.pixel_adaptive(i, m, dilations=(1, 2), iterations=2), fullgraph=True)
    assert torch.equal(compiled(image, maps), wk.pixel_adaptive(image, maps, dilations=(1, 2), iterations=2))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"image": torch.zeros(2, 3, 4, 5)}, ValueError, "image must have the batch of maps"),
        ({"image": torch.zeros(1, 4, 4, 5)}, ValueError, "image must be a tensor"),
        ({"image": torch.zeros(1, 3, 4, 5, dtype=torch.int32)}, TypeError, "image must be a tensor"),
        ({"maps": torch.zeros(1, 2, 4, 5, dtype=torch.int64)}, TypeError, "maps must be a floating point"),
        ({"maps": torch.zeros(2, 4, 5)}, ValueError, "maps must be a floating point"),
        ({"variant": "parr"}, ValueError, "variant must be one of 'pamr', 'par'"),
        ({"iterations": -1}, ValueError, "iterations must be"),
        ({"iterations": 2.0}, TypeError, "iterations must be"),
        ({"dilations": ()}, ValueError, "dilations must be"),
        ({"dilations": (0,)}, ValueError, "dilations must be"),
        ({"dilations": (1.5,)}, TypeError, "dilations must be"),
        ({"dilations": 3}, TypeError, "dilations must be"),
        ({"dilations": tuple(range(1, 34))}, ValueError, "dilations must be"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"image": torch.zeros(1, 3, 4, 5), "maps": torch.zeros(1, 2, 4, 5), **change}
    with pytest.raises(error, match=words):
        wk.pixel_adaptive(arguments.pop("image"), arguments.pop("maps"), **arguments)
