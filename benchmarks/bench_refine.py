"""`refine_cams` as a user calls it, beside the published whole and the best that libraries offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from wsss_models.networks.resnet import ResNet

import wsss_kernels as wk
from benchmarks import baselines, sizes
from benchmarks.cases import Aim, Case, Inputs, Result, Way, relative_error
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

ALPHA = 16.0
WALK_TOL = 4e-4  # the walk's 1e-4, then division by a maximum below 1
LIST = 64  # images
CHECKED = 16  # every so many of them are checked


def _inputs(channels: int) -> Callable[[Size], Inputs]:
    return lambda size: {"cams": sizes.maps(size, channels), "feats": sizes.features(size)}


def _refine(i: Inputs, **arguments: Any) -> Tensor:
    refined = wk.refine_cams(i["cams"], i["feats"], **arguments)
    assert isinstance(refined, Tensor)
    return refined


def _in_double(inputs: Inputs, **arguments: Any) -> Tensor:
    return _refine({"cams": inputs["cams"].double(), "feats": inputs["feats"].double()}, **arguments)


def _default() -> Case:
    steps = 62  # what refine_cams takes by itself on this map

    def library(i: Inputs) -> Callable[[], Tensor]:
        return lambda: baselines.library_refine(i["cams"], i["feats"], ALPHA, steps, automatic=True)

    return Case(
        name="refine_cams psa 47x63 C=2 background=16",
        op="refine_cams",
        groups=("refine", "memory"),
        size=sizes.PSA,
        channels=2,
        inputs=_inputs(2),
        expected=lambda i: _in_double(i, background=ALPHA),
        ways=(
            Way("ours", "ours", lambda i: lambda: _refine(i, background=ALPHA), tolerance=WALK_TOL),
            Way("shifted views + torch CSR", "library", library, tolerance=1e-3),
        ),
        aims=(Aim("ours", "median_ms", most=2.5), Aim("ours", "workspace_mb", most=5)),
        quick=True,
    )


def _published() -> Case:
    preset: dict[str, Any] = {"preset": "psa", "normalize": None}

    def library(i: Inputs) -> Callable[[], Tensor]:
        return lambda: baselines.library_refine(i["cams"], i["feats"], ALPHA, 256, automatic=False)

    def published(i: Inputs) -> Callable[[], Tensor]:
        return lambda: baselines.published_refine(i["cams"], i["feats"], ALPHA)

    return Case(
        name='refine_cams psa 47x63 C=2 preset="psa"',
        op="refine_cams",
        groups=("refine",),
        size=sizes.PSA,
        channels=2,
        inputs=_inputs(2),
        expected=lambda i: _in_double(i, **preset),
        ways=(
            Way("ours", "ours", lambda i: lambda: _refine(i, **preset), tolerance=WALK_TOL),
            Way("shifted views + torch CSR", "library", library, tolerance=1e-3),
            Way("gather + dense, published", "published", published, tolerance=1e-3),
        ),
    )


def _picture() -> Case:
    arguments: dict[str, Any] = {"method": "image"}
    return Case(
        name='refine_cams method="image", picture 375x500, cams 47x63 C=2',
        op="refine_cams",
        groups=("refine",),
        size=sizes.PSA,
        channels=2,
        inputs=lambda size: {"cams": sizes.maps(size, 2), "feats": sizes.picture()},
        expected=lambda i: _refine({"cams": i["cams"].double(), "feats": i["feats"]}, **arguments),
        ways=(Way("ours", "ours", lambda i: lambda: _refine(i, **arguments), tolerance=WALK_TOL),),
        quick=True,
    )


def _ragged(kind: str, grids: list[tuple[int, int]]) -> Case:
    arguments: dict[str, Any] = {"steps": 62}  # by itself a longer picture takes more
    size = Size(f"{LIST} {kind} of about 47x63", 47, 63, batch=LIST, dim=64)

    def inputs(size: Size) -> Inputs:
        images = [Size("", h, w, dim=size.dim) for h, w in grids[: size.batch]]
        return {
            "cams": [sizes.maps(image, 2, seed=i)[0] for i, image in enumerate(images)],
            "feats": [sizes.features(image, seed=i)[0] for i, image in enumerate(images)],
            "batch": {"cams": sizes.maps(size, 2), "feats": sizes.features(size)},
        }

    def ragged(i: Inputs) -> Callable[[], Result]:
        return lambda: wk.refine_cams(i["cams"], i["feats"], **arguments)

    def expected(i: Inputs) -> Result:
        return [
            _refine({"cams": cams[None].double(), "feats": feats[None].double()}, **arguments)[0]
            for cams, feats in zip(i["cams"][::CHECKED], i["feats"][::CHECKED], strict=True)
        ]

    return Case(
        name=f"refine_cams, {LIST} {kind} of as many pixels as 47x63, C=2 D=64",
        op="refine_cams",
        groups=("refine",),
        size=size,
        channels=2,
        inputs=inputs,
        expected=expected,
        ways=(
            Way(
                "ours, list",
                "ours",
                ragged,
                tolerance=WALK_TOL,
                compare=lambda result, expected, _: relative_error(list(result)[::CHECKED], expected),
            ),
            Way("ours, as many pixels in one batch", "context", lambda i: lambda: _refine(i["batch"], **arguments)),
        ),
    )


def _beside_the_network(batch: int) -> Case:
    """What refinement adds to the network whose maps it refines: features at stride 16, then the picture's colours."""
    size = Size(f"512x512 batch {batch}", 32, 32, batch=batch, dim=2048)
    classes = 20

    def inputs(size: Size) -> Inputs:
        labels = torch.zeros(size.batch, classes, dtype=torch.bool)
        labels[:, [3, 14]] = True
        picture = sizes.picture((16 * size.height, 16 * size.width)).expand(size.batch, -1, -1, -1).contiguous()
        cams = sizes.maps(size, classes) * labels[:, :, None, None]
        return {"cams": cams, "feats": sizes.features(size), "labels": labels, "picture": picture}

    def refined(i: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
        refined = wk.refine_cams(i["cams"].to(dtype), i["feats"].to(dtype), labels=i["labels"], guide=i["picture"])
        assert isinstance(refined, Tensor)
        return refined

    def forward(i: Inputs) -> Callable[[], Tensor]:
        device = i["cams"].device
        network = ResNet(50, strides=(2, 2, 2, 1)).to(device).eval()
        images = i["picture"].float() / 255

        @torch.no_grad()
        def run() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                return network.features(images)[-1]

        return run

    return Case(
        name=f"refine_cams of a ResNet-50's features, picture 512x512, batch {batch}, 2 of {classes} classes",
        op="refine_cams",
        groups=("refine",),
        size=size,
        channels=classes,
        inputs=inputs,
        expected=lambda i: refined(i, torch.float64),
        ways=(
            Way("ours", "ours", lambda i: lambda: refined(i), tolerance=2 * WALK_TOL),
            Way("the ResNet-50's forward", "context", forward),
        ),
    )


def _large() -> Case:
    return Case(
        name="refine_cams 256x256 C=21 D=64",
        op="refine_cams",
        groups=("memory",),
        size=sizes.LARGE,
        channels=21,
        inputs=_inputs(21),
        expected=_in_double,
        ways=(Way("ours", "ours", lambda i: lambda: _refine(i)),),
        aims=(Aim("ours", "workspace_mb", most=40),),
        timed=False,
    )


def _gpu_batch(size: Size, batch: int) -> Case:
    size = sizes.batched(size, batch)
    case = _default()
    name = f"refine_cams {size.name} C=2 background=16"
    return replace(case, name=name, groups=("refine",), size=size, ways=case.ways[:1], aims=(), quick=False)


_RAGGED = [
    _ragged("shapes from 22x135 to 85x35", sizes.ragged_sizes(LIST, 47 * 63)),
    _ragged("shapes of photographs", sizes.photograph_sizes(LIST)),
]
CASES: list[Case] = [_default(), _published(), _picture(), _beside_the_network(1), *_RAGGED, _large()]
GPU_CASES: list[Case] = [
    replace(_default(), groups=("refine",), aims=()),
    _gpu_batch(sizes.PSA, 16),
    _gpu_batch(sizes.IRN, 16),
    _published(),
    _picture(),
    _beside_the_network(1),
    _beside_the_network(16),
]


def test_refine_cams(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
