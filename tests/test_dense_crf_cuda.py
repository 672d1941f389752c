"""The CUDA kernels of dense_crf and dense_energy_loss on the CPU (tests/cuda/runner.py): against the float64 reference,
every access watched, a workspace of garbage."""

import math

import pytest
import torch

from tests.cuda import runner
from wsss_kernels import reference

pytestmark = pytest.mark.skipif(runner.absence is not None, reason=str(runner.absence))

DEVICE = {"sm_count": 2}
GAUSSIAN, BILATERAL = (3.0, 3.0), (80.0, 13.0, 10.0)


@pytest.fixture(scope="module")
def library():
    return runner.build(
        "csrc/dense_crf.cu", "csrc/dense_energy_loss.cu", "csrc/permutohedral.cu", "csrc/permutohedral_filter.cu",
        "tests/cuda/dense_crf_shim.cpp",
    )  # fmt: skip


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def picture(kind, batch, height, width):
    if kind == "constant":
        return torch.full((batch, 3, height, width), 90.0)
    noise = 255 * rand(batch, 3, height, width, seed=1)
    if kind == "noise":
        return noise.round()
    edge = 120.0 * (torch.arange(width) > torch.arange(height)[:, None])
    return (edge + torch.linspace(0, 40, width) + 0.1 * noise).round()


def crf(library, image, unary, iterations=1, gaussian=GAUSSIAN, bilateral=BILATERAL, workspace_of=None, **device):
    """The result and the launches. workspace_of: how many images the workspace is for."""
    options = (iterations, *map(float, gaussian), *map(float, bilateral))
    with library.run(**DEVICE | device) as gpu:
        images = len(image) if workspace_of is None else workspace_of
        size = gpu.ask("crf_workspace", images, *unary.shape[1:], *options)
        given, out = (gpu.input("image", image), gpu.input("unary", unary)), gpu.output("out", unary.shape)
        gpu.call("crf", *given, out, *unary.shape, *options, gpu.workspace(size), size)
        return out.tensor(), gpu.launches


def energy(library, image, probs, roi=None, xy=100.0, rgb=15.0, slope=True, workspace_of=None, **device):
    """Loss and slope, and the launches."""
    with library.run(**DEVICE | device) as gpu:
        images = len(image) if workspace_of is None else workspace_of
        size = gpu.ask("energy_workspace", images, *probs.shape[1:], xy, rgb)
        size += 256 * len(image)  # the blocks' sums of all images
        given = [gpu.input("image", image), gpu.input("probs", probs), None if roi is None else gpu.input("roi", roi)]
        loss, out = gpu.output("loss", ()), gpu.output("slope", probs.shape) if slope else None
        gpu.call("energy", *given, loss, out, *probs.shape, xy, rgb, gpu.workspace(size), size)
        return loss.tensor(), out.tensor() if slope else None, gpu.launches


# Values


CASES = {  # shape, picture, options
    "smooth": ((1, 3, 9, 13), "smooth", {"iterations": 2}),
    "a batch": ((3, 4, 5, 7), "smooth", {"iterations": 2}),
    "a column": ((2, 5, 11, 1), "noise", {}),
    "a row": ((1, 2, 1, 17), "noise", {}),
    "a pixel": ((1, 3, 1, 1), "noise", {}),
    "one label": ((1, 1, 5, 6), "smooth", {}),
    "few points, long lists": ((1, 2, 17, 13), "constant", {}),
    "as many points as there can be": ((1, 3, 9, 11), "noise", {"gaussian": (0.3, 3), "bilateral": (0.4, 0.5, 10)}),
    "several tiles of the sort": ((1, 6, 19, 31), "noise", {}),
    "eight threads a pixel": ((1, 21, 7, 6), "smooth", {"iterations": 2}),
    "many columns a thread": ((1, 133, 3, 4), "noise", {"iterations": 2}),
    "gaussian alone": ((2, 3, 8, 9), "smooth", {"bilateral": (80, 13, 0)}),
    "bilateral alone": ((2, 3, 8, 9), "smooth", {"gaussian": (3, 0), "bilateral": (50, 5, 10)}),
    "huge sigmas": ((1, 2, 9, 10), "noise", {"gaussian": (1e30, 1), "bilateral": (1e30, 1e30, 2)}),
    "no term": ((1, 3, 8, 9), "smooth", {"gaussian": (3, 0), "bilateral": (80, 13, 0), "iterations": 3}),
    "no iteration": ((1, 3, 8, 9), "smooth", {"iterations": 0}),
    "no iteration, many columns": ((2, 131, 2, 3), "smooth", {"iterations": 0}),
    "negative compat": ((1, 3, 8, 9), "smooth", {"gaussian": (1, -2), "bilateral": (64, 3, 4)}),
}


@pytest.mark.parametrize("name", CASES)
def test_crf_against_float64(library, name):
    shape, kind, options = CASES[name]
    image, unary = picture(kind, shape[0], *shape[2:]), 3 * rand(*shape)
    options = {"iterations": 1, "gaussian": GAUSSIAN, "bilateral": BILATERAL, **options}
    out, launches = crf(library, image, unary, order="random", **options)
    expected = reference.dense_crf(image, unary.double(), **options)
    assert (out - expected).abs().max() <= 2e-6
    if name.startswith("no "):
        assert len(launches) == 1


ENERGIES = {
    "smooth": ((2, 3, 9, 13), "smooth", {}),
    "one label": ((1, 1, 8, 7), "noise", {}),
    "a column": ((2, 5, 11, 1), "noise", {}),
    "a pixel": ((1, 2, 1, 1), "noise", {}),
    "long lists": ((1, 21, 13, 12), "constant", {}),
    "many points": ((1, 3, 9, 11), "noise", {"xy": 0.5, "rgb": 0.6}),
    "many columns a thread": ((1, 133, 3, 4), "noise", {}),
}


@pytest.mark.parametrize("with_roi", [False, True], ids=["everywhere", "roi"])
@pytest.mark.parametrize("name", ENERGIES)
def test_energy_against_float64(library, name, with_roi):
    shape, kind, options = ENERGIES[name]
    image, probs = picture(kind, shape[0], *shape[2:]), rand(*shape).softmax(1)
    roi = rand(shape[0], *shape[2:], seed=3) if with_roi else None
    leaf = probs.double().requires_grad_()
    sigmas = {"sigma_xy": options.get("xy", 100.0), "sigma_rgb": options.get("rgb", 15.0)}
    expected = reference.dense_energy_loss(image, leaf, roi=roi, **sigmas)
    (grad,) = torch.autograd.grad(expected, leaf)
    loss, slope, _ = energy(library, image, probs, roi, order="random", **options)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    assert (slope - grad).abs().max() <= 2e-6 * grad.abs().max()


def test_more_tiles_than_a_round_of_the_prefix_sums(library):
    image, probs = picture("smooth", 1, 299, 301), rand(1, 1, 299, 301)
    loss, _, launches = energy(library, image, probs, slope=False)
    assert next(launch.grid[0] for launch in launches if launch.kernel == "histogram_kernel") > 256
    torch.testing.assert_close(loss.double(), reference.dense_energy_loss(image, probs.double()), rtol=1e-6, atol=0)


def test_loss_without_slope_is_the_same(library):
    image, probs = picture("smooth", 2, 7, 9), rand(2, 3, 7, 9)
    loss, _, _ = energy(library, image, probs)
    alone, none, _ = energy(library, image, probs, slope=False)
    assert none is None and torch.equal(loss, alone)


def test_colours_beyond_the_scale(library):
    image, unary = picture("smooth", 1, 5, 6), rand(1, 2, 5, 6)
    odd = image.clone()
    odd[0, :, 2, 3] = torch.tensor([math.nan, math.inf, -math.inf])
    odd[0, 0, 4, 4] = -3.0
    tame = odd.nan_to_num(0.0, 255.0, 0.0).clamp(0, 255)
    assert torch.equal(crf(library, odd, unary)[0], crf(library, tame, unary)[0])


def test_forbidden_labels_and_nan(library):
    image, unary = picture("smooth", 2, 6, 7), rand(2, 5, 6, 7)
    unary[0, 2] = math.inf
    clean, _ = crf(library, image, unary)
    assert (clean[0, 2] == 0).all() and clean.isfinite().all()
    unary[0, 1, 3, 4] = math.nan
    out, _ = crf(library, image, unary)
    assert torch.equal(out.isnan(), reference.dense_crf(image, unary, iterations=1).isnan())
    assert torch.equal(out[1], clean[1])
    loss, slope, _ = energy(library, image, unary.nan_to_num(math.nan, 0.0))
    assert loss.isnan() and slope[0, 1].isnan().any() and not slope[1].isnan().any()


# Bits


def test_same_bits_whatever_the_order_and_the_device(library):
    image, unary = picture("noise", 2, 9, 11), rand(2, 5, 9, 11)
    image[0] = 30  # lists with cuts, lists of one
    first, first_loss = crf(library, image, unary, 2)[0], energy(library, image, unary)
    for device in ({"order": "reversed", "sm_count": 1}, {"order": "random", "seed": 5, "sm_count": 16}):
        assert torch.equal(crf(library, image, unary, 2, **device)[0], first)
        loss, slope, _ = energy(library, image, unary, **device)
        assert torch.equal(loss, first_loss[0]) and torch.equal(slope, first_loss[1])


def test_same_bits_however_many_images_side_by_side(library):
    image, unary = picture("noise", 3, 6, 7), rand(3, 3, 6, 7)
    image[1:] = image[:1]  # the same points, of other images
    together, launches = crf(library, image, unary)
    in_turn, more = crf(library, image, unary, workspace_of=1)
    assert torch.equal(together, in_turn) and len(more) == 3 * len(launches)
    alone = torch.cat([crf(library, image[b : b + 1], unary[b : b + 1])[0] for b in range(3)])
    assert torch.equal(together, alone)
    loss, slope, _ = energy(library, image, unary)
    other, same, _ = energy(library, image, unary, workspace_of=1)
    assert torch.equal(loss, other) and torch.equal(slope, same)


# Launches, refusals, nothing


def test_an_iteration_is_nine_launches(library):
    image, unary = picture("smooth", 1, 5, 6), rand(1, 3, 5, 6)
    one, two = (crf(library, image, unary, iterations)[1] for iterations in (1, 2))
    assert len(two) - len(one) == 9
    names = [launch.kernel.split("<")[0] for launch in two[-9:]]
    assert names == ["splat_kernel", "join_cuts_kernel", *["blur_kernel"] * 6, "mean_field_kernel"]
    assert all(launch.grid[1] == 2 for launch in two[-9:-1])  # both lattices


def test_large_batches_are_cut(library):
    """As many images as 2 GB hold; all their vertices would not fit 31 bits."""
    options = (10, *GAUSSIAN, *BILATERAL)
    with library.run(**DEVICE) as gpu:
        one, many = (gpu.ask("crf_workspace", images, 4, 375, 500, *options) for images in (1, 10**5))
        assert 2**30 < many <= 2**31 and one < many / 7
        assert gpu.ask("energy_workspace", 10**5, 4, 375, 500, 100.0, 15.0) <= 2**31


def test_refusals(library):
    image, unary = picture("smooth", 1, 5, 6), rand(1, 3, 5, 6)
    with pytest.raises(runner.CudaError, match="sigmas are too small"):
        crf(library, image, unary, bilateral=(80, 1e-6, 1))
    with library.run(**DEVICE) as gpu:
        given = gpu.input("image", image), gpu.input("unary", unary), gpu.output("out", unary.shape)
        little = gpu.workspace(1000)
        with pytest.raises(runner.CudaError, match="no room for an image"):
            gpu.call("crf", *given, *unary.shape, 1, *GAUSSIAN, *BILATERAL, little, 1000)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_nothing_to_infer(library, shape):
    image, maps = torch.zeros(shape[0], 3, *shape[2:]), torch.zeros(shape)
    out, launches = crf(library, image, maps)
    assert out.shape == shape and not launches
    loss, _, launches = energy(library, image, maps)
    assert loss == 0 and not launches
