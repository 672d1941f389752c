"""What the tests share: devices, tolerances, and the ops computed a second time in float64, by other means.

A test that takes `device`, or the fixture `wk` in place of the module, runs on the CPU and on a GPU where there is one.
`pytest --device cuda` runs those alone, and the tests only a GPU can show, all of them with a kernel of the GPU's own.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded: waiting threads sleep

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import wsss_kernels
from wsss_kernels import _dispatch
from wsss_kernels.info import info

# max |error| / max |reference| against float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
OPS = (
    "affinity_loss",
    "affinity_loss_from_features",
    "attention_entropy",
    "attention_walk",
    "boundary_affinity",
    "class_context",
    "cross_image_attention",
    "dense_crf",
    "dense_energy_loss",
    "hspp",
    "kmeans",
    "local_affinity",
    "mask_vote",
    "pixel_adaptive",
    "random_walk",
    "soft_histogram",
)

_quick = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("ci", max_examples=50 if _dispatch.native else 10, derandomize=True, **_quick)
hypothesis.settings.register_profile("gpu", max_examples=15, derandomize=True, **_quick)
hypothesis.settings.register_profile("release", max_examples=300, derandomize=False, **_quick)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--release", action="store_true", help="also the long tests, and 300 examples a property")
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="cpu: leave the GPU alone; cuda: only what runs on it, and never the reference (default: what there is)",
    )


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device")
        os.environ["WSSS_REQUIRE_NATIVE"] = "1"  # a test whose op falls back to the reference fails
        hypothesis.settings.load_profile("gpu")
    config.addinivalue_line("markers", "gpu: only a GPU can show it; skipped without one")
    config.addinivalue_line("markers", "native: needs the compiled module; skipped with WSSS_DISABLE_NATIVE=1")
    config.addinivalue_line("markers", "release: takes minutes; runs with --release")
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")
    if config.getoption("--release"):
        hypothesis.settings.load_profile("release")


def devices(config) -> list[str]:
    wanted = config.getoption("--device")
    return [wanted] if wanted else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(metafunc.config), indirect=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda":
        there = [item for item in items if "device" in item.fixturenames or item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[item for item in items if item not in there])
        items[:] = there
    for item in items:
        if item.get_closest_marker("gpu") and "cuda" not in devices(config):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if "release" in item.keywords and not config.getoption("--release"):
            item.add_marker(pytest.mark.skip(reason="runs with --release"))
        if "native" in item.keywords and os.environ.get("WSSS_DISABLE_NATIVE") == "1":
            item.add_marker(pytest.mark.skip(reason="the compiled module is switched off"))


@pytest.fixture(scope="session", autouse=True)
def native_or_told_so():
    """Without WSSS_DISABLE_NATIVE=1 a CPU op that falls back to the reference fails the whole suite."""
    if os.environ.get("WSSS_DISABLE_NATIVE") == "1":
        assert _dispatch.native is None
        return
    assert _dispatch.native is not None, _dispatch.native_absence
    kernels = info()["ops"]
    fallen_back = [(op, direction) for op in OPS for direction in ("forward", "backward")
                   if kernels[op]["cpu"][direction]["kernel"] not in ("native", None)]  # fmt: skip
    assert not fallen_back, f"these run no native kernel on the CPU: {fallen_back}"


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.param)


class OnDevice:
    """The package for tests that keep their data on the CPU: tensors go to the device, results come back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(wsss_kernels, name)

        def there_and_back(*args, **kwargs):
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
            return tree_map_only(Tensor, Tensor.cpu, function(*args, **kwargs))

        return there_and_back


@pytest.fixture(scope="session")
def wk(device):
    """wsss_kernels, computing on the device."""
    return wsss_kernels if device.type == "cpu" else OnDevice(device)


@pytest.fixture(scope="session")
def same(device):
    """same(x, y, tol): equal bit for bit; on a GPU, where the shape decides how the work is cut, within tol."""

    def check(x: Tensor, y: Tensor, tol: float = 1e-5) -> bool:
        return torch.equal(x, y) if device.type == "cpu" and _dispatch.native else relative_error(x, y) <= tol

    return check


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


class OneDevice(TorchDispatchMode):
    """Tensors without data and tensors with data do not meet, as tensors of a GPU and of the CPU would not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        met = {x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and (x.is_meta or x.dim())}
        assert len(met) < 2 or func is torch.ops.aten.copy_.default, f"{func} of tensors on two devices"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_device(monkeypatch):
    """Everything on the device "meta", where the ops run their references."""
    monkeypatch.delenv("WSSS_REQUIRE_NATIVE", raising=False)
    return OneDevice()


@pytest.fixture
def seeded():
    """torch's own random numbers are the same in every test."""
    torch.manual_seed(0)


@pytest.fixture
def nan_filled():
    """Every element of torch.empty is NaN, so that one nobody writes shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def _storage_offset(x: Tensor) -> Tensor:
    flat = x.new_empty(x.numel() + 3)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)  # 12 bytes past the allocation in float32: no vector is aligned


def _every_second(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


# Same values, another place in memory (expanded: values of its own).
LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "expanded": lambda x: x[:, :, :, :1].expand_as(x),
    "batch_expanded": lambda x: x[:1].expand_as(x),
    "storage_offset": _storage_offset,
    "every_second": _every_second,
    "negative_view": lambda x: torch._neg_view(-x),
    "imaginary_part": lambda x: torch.complex(x.float(), -x.float()).conj().imag,
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; infinite where one is finite and the other is not."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return 0.0
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    error = (actual - expected).abs()[finite].amax().item() if finite.any() else 0.0
    if error == 0:
        return 0.0
    largest = expected.abs()[finite].amax().item()
    return error / largest if largest > 0 else float("inf")


@pytest.fixture(scope="session")
def assert_close():
    """assert_close(actual, expected): within the tolerance of actual's dtype, or the one given, of a float64 result."""

    def check(actual: Tensor, expected: Tensor, tol: float | None = None) -> None:
        tol = TOLERANCE[actual.dtype] if tol is None else tol
        error = relative_error(actual, expected)
        assert error <= tol, f"off by {error:.2e} of the largest value, allowed {tol:.0e}"

    check.error = relative_error
    return check


class Oracle:
    """The ops once more, on the CPU: explicit lists of pairs and matrices in float64, no code of the package's."""

    @staticmethod
    @functools.lru_cache
    def offsets(radius: int) -> list[tuple[int, int]]:
        disc = [(y, x) for y in range(-20, 21) for x in range(-20, 21) if y * y + x * x < radius * radius]
        return [offset for offset in disc if offset > (0, 0)]  # tuples compare row-major

    @staticmethod
    @functools.lru_cache
    def links(height: int, width: int, radius: int, border: str = "full") -> tuple[Tensor, Tensor, Tensor]:
        """Neighbour index, source pixel and target pixel (y * width + x) of every pair."""
        margin = radius - 1 if border == "cropped" else 0
        found = []
        for k, (dy, dx) in enumerate(Oracle.offsets(radius)):
            y = torch.arange(max(0, height - max(dy, margin)))[:, None]
            x = torch.arange(max(-dx, margin), max(-dx, margin, width - max(dx, margin)))
            source = (y * width + x).flatten()
            found.append(torch.stack([torch.full_like(source, k), source, source + dy * width + dx]))
        k, source, target = torch.cat([torch.zeros(3, 0, dtype=torch.long), *found], dim=1)
        return k, source, target

    @staticmethod
    def affinity(feats: Tensor, radius: int = 5, metric: str = "l1", scale: float | str = 1.0, border: str = "full"):
        batch, _, height, width = feats.shape
        x = feats.double().cpu().flatten(2)
        pairs, chosen = Oracle.links(height, width, radius), Oracle.links(height, width, radius, border)

        def distances(links):
            here, there = x[:, :, links[1]], x[:, :, links[2]]
            if metric == "l1":
                return (here - there).abs().mean(1)
            lengths = here.norm(dim=1) * there.norm(dim=1)
            dot = (here * there).sum(1)
            return 1 - torch.where(lengths > 0, dot / torch.where(lengths > 0, lengths, 1.0), 0.0)

        out = torch.zeros(batch, len(Oracle.offsets(radius)), height * width, dtype=torch.float64)
        distance = distances(chosen)
        if scale == "auto":
            mean = distances(pairs).detach().mean(1, keepdim=True)  # NaN for a map without pairs, which has no values
            value = torch.exp(-distance / torch.where(mean > 0, mean, 1.0))
        elif metric == "l1":
            value = torch.exp(-distance / scale)
        else:
            value = (1 - distance).relu()
        every = torch.arange(batch)[:, None].expand_as(value)
        out = out.index_put((every, chosen[0].expand_as(value), chosen[1].expand_as(value)), value)
        return out.unflatten(2, (height, width))

    @staticmethod
    def weights(affinity: Tensor, radius: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Source, target and [B, links] weight of every pair of the map, each once."""
        height, width = affinity.shape[-2:]
        k, source, target = Oracle.links(height, width, radius)
        a = affinity.double().cpu().flatten(2)[:, k, source]
        return source, target, torch.where(a > 0, torch.where(a > 0, a, 1.0) ** beta, 0.0)

    @staticmethod
    def transition(affinity: Tensor, radius: int = 5, beta: float = 8.0) -> Tensor:
        """P = D^-1 W, dense [B, N, N], differentiable."""
        batch, pixels = affinity.shape[0], affinity.shape[-2] * affinity.shape[-1]
        source, target, value = Oracle.weights(affinity, radius, beta)
        half = torch.zeros(batch, pixels, pixels, dtype=torch.float64)
        every = torch.arange(batch)[:, None].expand_as(value)
        half = half.index_put((every, source.expand_as(value), target.expand_as(value)), value)
        w = half + half.mT + torch.eye(pixels, dtype=torch.float64)
        return w / w.sum(-1, keepdim=True)

    @staticmethod
    def dense_walk(maps: Tensor, affinity: Tensor, radius: int = 5, beta: float = 8.0, steps: int = 256) -> Tensor:
        power = torch.linalg.matrix_power(Oracle.transition(affinity, radius, beta), steps)
        return (maps.double().cpu().flatten(2) @ power.mT).reshape(maps.shape)

    @staticmethod
    def walk(maps: Tensor, affinity: Tensor, radius: int = 5, beta: float = 8.0, steps: int = 256) -> Tensor:
        """The same step by step on a sparse matrix: for larger maps, no gradient."""
        pixels = affinity.shape[-2] * affinity.shape[-1]
        source, target, values = Oracle.weights(affinity.detach(), radius, beta)
        every = torch.arange(pixels)
        rows, columns = torch.cat([source, target, every]), torch.cat([target, source, every])
        out = []
        for x, value in zip(maps.detach().double().cpu(), values, strict=True):
            value = torch.cat([value, value, torch.ones(pixels, dtype=torch.float64)])
            degree = torch.zeros(pixels, dtype=torch.float64).index_add(0, rows, value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                p = torch.sparse_coo_tensor(
                    torch.stack([rows, columns]), value / degree[rows], (pixels, pixels)
                ).to_sparse_csr()
            y = x.flatten(1).T.contiguous()
            for _ in range(steps):
                y = p @ y
            out.append(y.T.reshape(x.shape))
        return torch.stack(out) if out else maps.double().cpu()


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    return Oracle


class Scenes:
    """Inputs like those of the published pipelines; every call with the same numbers gives the same tensors."""

    @staticmethod
    def maps(batch: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
        """Class activation maps: smooth blobs with peak 1."""
        generator = torch.Generator().manual_seed(seed)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = torch.rand(batch, channels, 2, 1, 1, generator=generator) * torch.tensor([height, width]).view(2, 1, 1)
        size = (0.05 + 0.2 * torch.rand(batch, channels, 1, 1, generator=generator)) * max(height, width)
        blob = torch.exp(-((y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2) / (2 * size**2))
        return blob / blob.amax((2, 3), keepdim=True).clamp_min(1e-6)

    @staticmethod
    def features(batch: int, dim: int, height: int, width: int, seed: int = 0, noise: float = 0.05) -> Tensor:
        """Piecewise smooth: Voronoi cells of random feature vectors, plus noise."""
        generator = torch.Generator().manual_seed(seed)
        y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
        cells = 8
        centres = torch.rand(batch, cells, 2, 1, 1, generator=generator)
        nearest = ((y - centres[:, :, 0]) ** 2 + (x - centres[:, :, 1]) ** 2).argmin(1)
        values = torch.randn(batch, cells, dim, generator=generator)
        feats = torch.gather(values, 1, nearest.flatten(1)[..., None].expand(-1, -1, dim))
        feats = feats.mT.reshape(batch, dim, height, width) * 0.5
        return feats + noise * torch.randn(batch, dim, height, width, generator=generator)

    @staticmethod
    def edge_affinity(height: int, width: int, radius: int, seed: int = 0) -> Tensor:
        """IRNet's kind [1, K, H, W]: 1 - the largest boundary on the straight way; thin edges, flat regions."""
        generator = torch.Generator().manual_seed(seed)
        region = Scenes.features(1, 1, height, width, seed, noise=0.0)[0, 0]
        edge = torch.zeros(height, width)
        edge[:, 1:] = (region[:, 1:] != region[:, :-1]).float()
        edge[1:] = torch.maximum(edge[1:], (region[1:] != region[:-1]).float())
        boundary = edge * (0.7 + 0.3 * torch.rand(height, width, generator=generator))
        boundary = boundary + 1e-3 * torch.rand(height, width, generator=generator)
        boundary = boundary.clamp(max=1)
        planes = []
        for dy, dx in Oracle.offsets(radius):
            ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            inside = (ys + dy < height) & (xs + dx >= 0) & (xs + dx < width)
            worst = torch.zeros(height, width)
            points = max(dy, abs(dx))
            for i in range(points + 1):
                py = (ys + round(dy * i / points)).clamp(0, height - 1)
                px = (xs + round(dx * i / points)).clamp(0, width - 1)
                worst = torch.maximum(worst, boundary[py, px])
            planes.append(torch.where(inside, 1 - worst, 0.0))
        return torch.stack(planes)[None]


@pytest.fixture(scope="session")
def scenes() -> type[Scenes]:
    return Scenes
