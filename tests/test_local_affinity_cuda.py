"""The CUDA kernels of local_affinity, run on the CPU with every memory access checked."""

import itertools
import math

import pytest
import torch

from tests.cuda import runner
from wsss_kernels import reference
from wsss_kernels.neighbours import neighbour_count

pytestmark = pytest.mark.skipif(runner.absence is not None, reason=str(runner.absence))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of DataType in csrc/local_affinity.h
VARIANTS = [("l1", 1.0), ("l1", 0.2), ("l1", "auto"), ("cosine", 1.0), ("cosine", "auto")]
H100 = {"sm_count": 132, "shared_per_block": 232448}
SHAPES = [  # B, D, H, W: a tile has 8 (backward 4) rows and 32 columns
    (1, 1, 1, 1), (2, 3, 1, 7), (1, 2, 9, 1), (3, 4, 3, 4), (1, 5, 8, 32), (1, 4, 9, 33), (1, 37, 17, 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return runner.build(
        "csrc/local_affinity.cu", "csrc/local_affinity_backward.cu", "tests/cuda/local_affinity_shim.cpp"
    )


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Op:
    """The op on a device of these settings."""

    def __init__(self, library, radius=5, metric="l1", scale=1.0, border="full", misaligned_by=0, **settings):
        self.library, self.settings = library, {**H100, **settings}
        self.options = {"radius": radius, "metric": metric, "scale": scale, "border": border}
        self.misaligned_by = misaligned_by

    def _problem(self, feats):
        scale = 0.0 if self.options["scale"] == "auto" else self.options["scale"]
        flags = int(self.options["metric"] == "cosine"), scale, int(self.options["border"] == "cropped")
        return *feats.shape, self.options["radius"], *flags, DTYPES.index(feats.dtype)

    def forward(self, feats):
        problem, (batch, _, *size) = self._problem(feats), feats.shape
        shape = batch, neighbour_count(self.options["radius"]), *size
        with self.library.run(**self.settings) as gpu:
            x = gpu.input("feats", feats, self.misaligned_by)
            out = gpu.output("out", shape, feats.dtype, self.misaligned_by)
            scales = gpu.output("scales", (batch,))
            workspace = gpu.workspace(gpu.ask("forward_workspace", *problem))
            gpu.call("forward", x, out, scales, *problem, workspace)
            self.launches = gpu.launches
            return out.tensor(), scales.tensor()

    def backward(self, grad, feats, affinity, scales):
        problem = self._problem(feats)
        with self.library.run(**self.settings) as gpu:
            inputs = [
                gpu.input(name, values, self.misaligned_by)
                for name, values in (("grad", grad), ("feats", feats), ("affinity", affinity))
            ]
            out = gpu.output("grad_feats", feats.shape, feats.dtype, self.misaligned_by)
            workspace = gpu.workspace(gpu.ask("backward_workspace", *problem))
            gpu.call("backward", *inputs, gpu.input("scales", scales), out, *problem, workspace)
            self.launches = gpu.launches
            return out.tensor()

    def check(self, feats, assert_close):
        """Both directions against the reference; what they gave."""
        out, scales = self.forward(feats)
        x = feats.double().requires_grad_()
        expected = reference.local_affinity(x, **self.options)
        assert_close(out, expected.detach())
        if out.numel() == 0:
            grad_feats = self.backward(out, feats, out, scales)
            assert not grad_feats.any()
            return out, grad_feats
        grad = rand(*out.shape, seed=1).to(feats.dtype)
        (expected_grad,) = torch.autograd.grad(expected, x, grad.double())
        grad_feats = self.backward(grad, feats, out, scales)
        assert_close(grad_feats, expected_grad)
        return out, grad_feats


# Values


def test_two_pixels_by_hand(library):
    feats = torch.tensor([[[[0.0, 1.0]], [[2.0, 5.0]]]])  # differences 1 and 3, mean 2
    op = Op(library, radius=2, scale=4.0)
    out, scales = op.forward(feats)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([math.exp(-0.5), 0, 0, 0]))
    assert out[0, :, 0, 1].eq(0).all() and scales.tolist() == [4]
    grad = op.backward(torch.ones_like(out), feats, out, scales)[0, :, 0]
    slope = math.exp(-0.5) / 4 / 2  # the second pixel is the greater: nearer to it is more alike
    torch.testing.assert_close(grad, torch.tensor([[slope, -slope], [slope, -slope]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize("radius", [5, 4])
def test_against_reference(library, radius, metric, scale, dtype, assert_close):
    shapes = SHAPES if dtype == torch.float32 else SHAPES[3:5]
    for shape, border in itertools.product(shapes, ("full", "cropped")):
        Op(library, radius, metric, scale, border).check(rand(*shape).to(dtype), assert_close)


@pytest.mark.parametrize("radius", range(1, 17))
def test_every_radius(library, radius, assert_close):
    feats = rand(1, 3, 18, 34)
    for metric, scale, border in (("l1", 0.2, "cropped"), ("cosine", "auto", "full")):
        Op(library, radius, metric, scale, border).check(feats, assert_close)


@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize("radius", [5, 6])
def test_equal_values(library, radius, metric, scale, assert_close):
    """Ties, and maps without any difference, whose gradient is exactly 0."""
    op = Op(library, radius, metric, scale)
    if metric == "l1":
        op.check(rand(1, 6, 9, 9).mul(3).round().relu(), assert_close)
        _, grad = op.check(rand(1, 40, 1, 1).expand(1, 40, 7, 9), assert_close)
        assert not grad.any()
    zeros = torch.zeros(1, 3, 6, 7)
    out, scales = op.forward(zeros)
    assert_close(out, reference.local_affinity(zeros.double(), **op.options))
    assert scales[0] == (1 if scale == "auto" else torch.tensor(scale))
    assert not op.backward(torch.ones_like(out), zeros, out, scales).any()


@pytest.mark.parametrize("radius", [5, 6])
def test_like_vectors(library, radius):
    """Cosines of 1 up to rounding: no difference to take a scale from."""
    feats = rand(1, 700, 1, 1).expand(1, 700, 5, 6) * torch.linspace(1, 9, 30).reshape(5, 6)
    for sm_count in (1, 132):
        out, scales = Op(library, radius, "cosine", "auto", sm_count=sm_count).forward(feats)
        assert scales == 1 and out.max() == 1
        assert (out[out > 0] > 1 - 1e-6).all()


@pytest.mark.parametrize("radius", [5, 3])
def test_large_and_small_values(library, radius, assert_close):
    for metric, scale in VARIANTS:
        op = Op(library, radius, metric, scale)
        large = (rand(1, 70, 5, 6) * 6e4).half()
        assert_close(op.forward(large)[0], reference.local_affinity(large.double(), **op.options))
        op.check(large.float(), assert_close)
        if metric == "cosine" or scale == "auto":
            out, _ = op.forward(rand(1, 7, 5, 6) * 1e-30)
            assert_close(out, reference.local_affinity(rand(1, 7, 5, 6).double(), **op.options))
    Op(library, radius, scale=1e-300).check(rand(1, 3, 5, 6), assert_close)
    assert Op(library, radius, scale=1e-300).forward(torch.ones(1, 3, 5, 6))[0].sum(dim=1)[0, 0, 2] > 0  # no NaN
    assert Op(library, radius, scale=1e300).forward(rand(1, 3, 5, 6))[0].max() == 1


def test_many_equal_terms(library):
    """A plain float32 sum of these is off by 1e-5."""
    feats = torch.zeros(1, 3000, 2, 2)
    feats[..., 1] = 0.1
    for radius, sm_count in ((5, 1), (3, 1)):
        out, _ = Op(library, radius, scale=0.1, sm_count=sm_count).forward(feats)
        error = out[0, 0, 0, 0].double() / torch.exp(-torch.tensor(0.1).double() / 0.1) - 1
        assert abs(error) < 1e-6


@pytest.mark.parametrize("radius", [5, 6])
@pytest.mark.parametrize("metric, scale", VARIANTS)
def test_nan_stays_with_its_pixel(library, radius, metric, scale, assert_close):
    """With the automatic scale with its image."""
    feats = rand(2, 9, 15, 40)
    feats[0, 3, 4, 31] = math.nan
    op = Op(library, radius, metric, scale)
    out, scales = op.forward(feats)
    expected = reference.local_affinity(feats.double(), **op.options)
    assert torch.equal(out.isnan(), expected.isnan())
    assert_close(out.nan_to_num(), expected.nan_to_num())
    grad = op.backward(rand(*out.shape, seed=1), feats, out, scales)
    rows = 15 if scale == "auto" else 4 + radius  # the NaN reaches its neighbours
    assert not grad[1].isnan().any() and not grad[0, :, rows:].isnan().any()


@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 1, 0, 0)], ids=str)
def test_empty(library, shape, metric, scale, assert_close):
    for radius in (1, 5, 6):
        op = Op(library, radius, metric, scale)
        feats = torch.zeros(shape)
        _, scales = op.forward(feats)
        assert torch.equal(scales, torch.full((shape[0],), 1.0 if scale == "auto" else scale))
        op.check(feats, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [5, 4])
def test_unaligned_tensors(library, radius, dtype, assert_close):
    for metric in ("l1", "cosine"):
        op = Op(library, radius, metric, misaligned_by=dtype.itemsize)
        op.check(rand(1, 3, 5, 7).to(dtype), assert_close)


# How the work is cut

SMALL = {"shared_per_block": 65536, "shared_per_sm": 65536}
FORMS = {  # device, shape, slices, whether the channels are split over blocks
    "one slice": ({**SMALL, "sm_count": 1}, (2, 100, 9, 9), 1, False),
    "two slices": ({"shared_per_block": 101376, "sm_count": 1}, (2, 100, 9, 9), 2, False),
    "three slices": ({"sm_count": 1}, (2, 200, 9, 9), 3, False),
    "one slice, split": (SMALL, (1, 61, 9, 9), 1, True),
    "three slices, split": ({}, (1, 301, 9, 9), 3, True),
    "few channels": ({}, (1, 3, 9, 9), 1, False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric, scale", VARIANTS[1:])
def test_forms(library, form, metric, scale, assert_close):
    settings, shape, slices, split = FORMS[form]
    op = Op(library, 5, metric, scale, **settings)
    feats = rand(*shape)
    op.forward(feats)
    names = [launch.kernel.split("<")[0] for launch in op.launches]
    finish = ["distances_kernel", "scaled_kernel"] if scale == "auto" else ["finish_kernel"] if split else []
    norms = ["inverse_norms_kernel"] if metric == "cosine" else []
    assert names == [*norms, "radius5::sums_kernel", *finish]
    sums = op.launches[len(norms)]
    assert sums.block[0] == slices * 128 and (sums.grid[1] > 1) == split
    assert sums.shared <= op.settings["shared_per_block"]
    op.check(feats, assert_close)
    assert op.launches[-1 - len(norms)].kernel.startswith("radius5::gather_kernel")


@pytest.mark.parametrize("metric, scale", [("l1", 0.3), ("cosine", "auto")])
def test_any_radius_split(library, metric, scale, assert_close):
    op = Op(library, 7, metric, scale)
    feats = rand(1, 123, 7, 8)
    op.forward(feats)
    assert max(launch.grid[1] for launch in op.launches) > 3  # 3 sets of segments
    op.check(feats, assert_close)


@pytest.mark.parametrize("warps, shared", [(2, 56000), (3, 65536), (8, 232448)])
def test_backward_warps(library, warps, shared, assert_close):
    """As many as shared memory has room for; each takes several sets of channels."""
    op = Op(library, shared_per_block=shared, sm_count=1)
    op.check(rand(1, 75, 5, 6), assert_close)
    assert op.launches[-1].block[0] == 32 * warps


@pytest.mark.parametrize("radius", [5, 6])
@pytest.mark.parametrize("metric, scale", [("l1", 1.0), ("l1", "auto"), ("cosine", "auto")])
def test_same_bits_in_every_order(library, radius, metric, scale):
    feats, found = rand(2, 45, 9, 9), []
    for order, seed in [("forward", 0), ("reversed", 0), ("random", 1)]:
        op = Op(library, radius, metric, scale, order=order, seed=seed)
        out, scales = op.forward(feats)
        grad = op.backward(rand(*out.shape, seed=1), feats, out, scales)
        found.append((out, scales, grad))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_images_of_a_batch_are_cut_alike(library):
    """On one device; another number of images may split the channels otherwise."""
    feats = rand(3, 20, 9, 9)
    out, scales = Op(library, scale="auto", sm_count=1).forward(feats)
    for b in range(3):
        alone = Op(library, scale="auto", sm_count=1).forward(feats[b : b + 1])
        assert torch.equal(alone[0][0], out[b]) and alone[1][0] == scales[b]
