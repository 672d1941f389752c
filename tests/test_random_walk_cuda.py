"""The CUDA walk on the CPU (tests/cuda/runner.py): every form against the float64 reference, every access watched."""

from __future__ import annotations

import ctypes
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.cuda import runner
from wsss_kernels import _dispatch, reference
from wsss_kernels.ops.random_walk import SOLVERS
from wsss_kernels.reference.local_affinity import pair_exists

pytestmark = pytest.mark.skipif(runner.absence is not None, reason=str(runner.absence))

FORMS = ("cluster", "grid", "phases")
# Devices that leave the launcher one form for small maps of radius 5.
CLUSTERS = {"sm_count": 16}
NO_CLUSTERS = {"sm_count": 8, "clusters": False, "capability": 80}
NO_BARRIERS = {"sm_count": 8, "clusters": False, "cooperative": False, "capability": 75}
every_form = pytest.mark.parametrize(
    "form, machine", [("cluster", CLUSTERS), ("grid", NO_CLUSTERS), ("phases", NO_BARRIERS)], ids=FORMS
)
TWO_BLOCKS = (26, 33)  # more pixels than one block owns, whose form is a cluster of one on any device


@pytest.fixture(scope="module")
def library():
    return runner.build(
        *(f"csrc/random_walk{part}" for part in (".cu", "_phases.cu", "_resident.cu", "_series.cpp")),
        "tests/cuda/random_walk_shim.cpp",
    )


@dataclasses.dataclass
class Plan:
    form: str
    workspace: int  # bytes
    maps: int
    blocks: int
    items_at_once: int
    half_weights: bool


def problem(maps: Tensor, *, radius=5, beta=8.0, steps=64, solver="auto", tol=1e-4) -> tuple[int | float, ...]:
    return (*maps.shape, radius, float(beta), steps, SOLVERS.index(solver), float(tol))


def plan(gpu, maps: Tensor, **options) -> Plan:
    values = (ctypes.c_int64 * 6)()
    gpu.call("plan", *problem(maps, **options), values)
    form, workspace, in_item, blocks, items_at_once, half = values
    return Plan(FORMS[form], workspace, in_item, blocks, items_at_once, bool(half))


def walk(gpu, maps: Tensor, affinity: Tensor, **options) -> tuple[Tensor, Plan]:
    chosen = plan(gpu, maps, **options)
    out = gpu.output("out", tuple(maps.shape))
    given = gpu.input("maps", maps), gpu.input("affinity", affinity)
    gpu.call("forward", *given, out, *problem(maps, **options), gpu.workspace(chosen.workspace))
    return out.tensor(), chosen


def walk_backward(
    gpu, grad: Tensor, maps: Tensor, affinity: Tensor, wants_maps=True, wants_affinity=True, **options
) -> tuple[Tensor | None, Tensor | None]:
    arguments = problem(maps, **options)
    size = gpu.ask("backward_workspace", *arguments, int(wants_affinity))
    grad_maps = gpu.output("grad_maps", tuple(maps.shape)) if wants_maps else None
    grad_affinity = gpu.output("grad_affinity", tuple(affinity.shape)) if wants_affinity else None
    given = gpu.input("grad", grad), gpu.input("maps", maps), gpu.input("affinity", affinity)
    gpu.call("backward", *given, grad_maps, grad_affinity, *arguments, gpu.workspace(size))
    return tuple(None if result is None else result.tensor() for result in (grad_maps, grad_affinity))


def inputs(scenes, batch, channels, height, width, radius=5, seed=0) -> tuple[Tensor, Tensor]:
    feats = scenes.features(batch, 6, height, width, seed)
    return scenes.maps(batch, channels, height, width, seed), reference.local_affinity(feats, radius, scale="auto")


def expected(maps: Tensor, affinity: Tensor, *, radius=5, beta=8.0, steps=64, **_) -> Tensor:
    return reference.random_walk(maps.double(), affinity.double(), radius=radius, beta=beta, steps=steps)


def check(gpu, maps: Tensor, affinity: Tensor, error=None, **options) -> Plan:
    out, chosen = walk(gpu, maps, affinity, **options)
    tol = options.get("tol", 1e-4) if error is None else error
    assert (out - expected(maps, affinity, **options)).abs().max() <= tol * maps.abs().max()
    return chosen


# Form, device, shape and what the launcher should make of it.
CASES = {
    "one block": ("cluster", CLUSTERS, (1, 1, 9, 11), {}),
    "a cluster": ("cluster", CLUSTERS, (1, 2, 21, 17), {}),
    "sixteen blocks": ("cluster", CLUSTERS, (1, 1, 70, 13), {}),
    "bands of unequal rows": ("cluster", {"sm_count": 132}, (1, 1, 25, 10), {}),
    "four maps an item": ("cluster", {"sm_count": 1}, (2, 6, 9, 10), {}),
    "float16 weights": ("cluster", CLUSTERS, (1, 2, 22, 19), {"tol": 1e-3}),
    "by power": ("cluster", CLUSTERS, (1, 1, 17, 14), {"solver": "power", "steps": 30}),
    "one step": ("cluster", CLUSTERS, (1, 2, 6, 7), {"steps": 1}),
    "an odd number of steps": ("cluster", CLUSTERS, (1, 1, 8, 9), {"steps": 37}),
    "a row": ("cluster", CLUSTERS, (1, 1, 1, 40), {}),
    "a pixel": ("cluster", CLUSTERS, (1, 2, 1, 1), {}),
    "a grid": ("grid", NO_CLUSTERS, (1, 2, 26, 31), {}),
    "a grid of tall bands": ("grid", {**NO_CLUSTERS, "sm_count": 3}, (1, 1, 40, 31), {"steps": 9}),
    "a cluster of tall bands": ("cluster", {"sm_count": 3}, (1, 1, 40, 31), {"steps": 9}),
    "a grid in rounds": ("grid", {**NO_CLUSTERS, "sm_count": 3}, (3, 6, 17, 46), {"steps": 9}),
    "a grid, float16 weights": ("grid", NO_CLUSTERS, (1, 1, 30, 37), {"tol": 1e-3}),
    "another radius": ("phases", CLUSTERS, (1, 2, 9, 12), {"radius": 3}),
    "a large radius": ("phases", CLUSTERS, (1, 1, 7, 9), {"radius": 12, "steps": 9}),
    "no links": ("phases", CLUSTERS, (1, 2, 5, 4), {"radius": 1}),
    "in double": ("phases", CLUSTERS, (1, 2, 9, 10), {"tol": 1e-7}),
    "more maps than one thread's": ("phases", CLUSTERS, (2, 6, 8, 9), {"radius": 4}),
    "a launch a product": ("phases", NO_BARRIERS, (1, 2, 20, 60), {"steps": 20}),
    "no steps": ("phases", CLUSTERS, (1, 2, 4, 5), {"steps": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, library, scenes):
    form, machine, shape, options = CASES[name]
    maps, affinity = inputs(scenes, *shape, radius=options.get("radius", 5))
    with library.run(order="random", **machine) as gpu:
        chosen = check(gpu, maps, affinity, **options)
        assert chosen.form == form, chosen
        assert chosen.half_weights == (options.get("tol") == 1e-3 and form != "phases")
        launches = 0 if options.get("steps") == 0 else 1
        if name == "a launch a product":
            launches = 2 + products(**options)
        assert len(gpu.launches) == launches
        if form == "cluster":
            assert gpu.launches[0].cluster == chosen.blocks and not gpu.launches[0].cooperative
        elif launches == 1:
            assert gpu.launches[0].cooperative


def products(steps=64, solver="auto", tol=1e-4, **_) -> int:
    assert _dispatch.native is not None
    _, series = _dispatch.native.walk_method(steps, SOLVERS.index(solver), tol)
    return len(series) - 1 if series else steps


def test_cases_cover_what_they_say(library, scenes):
    def planned(name):
        _, machine, shape, options = CASES[name]
        with library.run(**machine) as gpu:
            return plan(gpu, torch.zeros(shape), **options)

    assert planned("one block").blocks == 2 and planned("a pixel").blocks == 1
    assert planned("sixteen blocks").blocks == 16
    assert planned("four maps an item").maps == 4 and planned("a cluster").maps == 1
    rounds = planned("a grid in rounds")
    assert rounds.maps * rounds.items_at_once < 18 and rounds.blocks > 1


@pytest.mark.parametrize("order", runner.ORDERS)
@every_form
def test_any_order_of_threads(form, machine, order, library, scenes):
    maps, affinity = inputs(scenes, 1, 2, *TWO_BLOCKS, seed=1)
    with library.run(order=order, **machine) as gpu:
        out, chosen = walk(gpu, maps, affinity, steps=12)
    assert chosen.form == form
    with library.run(order="forward", **machine) as gpu:
        assert torch.equal(out, walk(gpu, maps, affinity, steps=12)[0])


@pytest.mark.parametrize("machine", [CLUSTERS, NO_CLUSTERS], ids=["cluster", "grid"])
@pytest.mark.parametrize("tol", [1e-4, 1e-3])
def test_thin_edges_and_many_steps(machine, tol, library, scenes):
    maps, affinity = scenes.maps(1, 1, 24, 30), scenes.edge_affinity(24, 30, 5)
    with library.run(**machine) as gpu:
        check(gpu, maps, affinity, steps=256, beta=10.0, tol=tol)


@pytest.mark.parametrize("machine", [CLUSTERS, NO_CLUSTERS], ids=["cluster", "grid"])
def test_power_stays_within_1e_5(machine, library, scenes):
    maps, affinity = scenes.maps(1, 1, 16, 20), scenes.edge_affinity(16, 20, 5)
    with library.run(**machine) as gpu:
        check(gpu, maps, affinity, error=1e-5, steps=256, beta=10.0, solver="power")


@every_form
def test_absent_maps_cost_nothing_and_stay_zero(form, machine, library, scenes):
    maps, affinity = inputs(scenes, 2, 3, *TWO_BLOCKS)
    maps[:, 1] = 0
    maps[1] = 0
    with library.run(**machine) as gpu:
        out, chosen = walk(gpu, maps, affinity, steps=9)
    assert chosen.form == form
    assert (out[:, 1] == 0).all() and (out[1] == 0).all()
    assert (out - expected(maps, affinity, steps=9)).abs().max() <= 1e-4


@every_form
def test_constant_maps_stay_what_they_are(form, machine, library, scenes):
    _, affinity = inputs(scenes, 1, 1, *TWO_BLOCKS)
    maps = torch.full((1, 2, *TWO_BLOCKS), 0.7)
    with library.run(**machine) as gpu:
        out, chosen = walk(gpu, maps, affinity, solver="power", steps=40)
    assert chosen.form == form and torch.equal(out, maps)


@every_form
def test_nan_stays_in_its_image_and_map(form, machine, library, scenes):
    maps, affinity = inputs(scenes, 3, 2, *TWO_BLOCKS)
    clean = expected(maps, affinity, steps=9)
    maps[0, 1, 3, 4] = math.nan
    affinity[1, 5, 6, 7] = math.nan
    with library.run(**machine) as gpu:
        out, chosen = walk(gpu, maps, affinity, steps=9)
    assert chosen.form == form
    assert (out[0, 0] - clean[0, 0]).abs().max() <= 1e-4 and (out[2] - clean[2]).abs().max() <= 1e-4
    assert out[0, 1].isnan().any() and out[1].isnan().any()


@every_form
def test_links_out_of_the_map_are_never_read_into_the_result(form, machine, library, scenes):
    maps, affinity = inputs(scenes, 1, 1, *TWO_BLOCKS)
    garbage = torch.where(pair_exists(*TWO_BLOCKS, 5, "full", affinity.device), affinity, math.nan)
    with library.run(**machine) as gpu:
        out, chosen = walk(gpu, maps, garbage, steps=9)
    assert chosen.form == form
    assert (out - expected(maps, affinity, steps=9)).abs().max() <= 1e-4


@pytest.mark.parametrize("beta", [0, 1, 2.5, 1e39])
def test_powers_of_the_affinity(beta, library, scenes):
    maps, affinity = inputs(scenes, 1, 1, 8, 9)
    affinity[:, :3] = 1
    with library.run(**CLUSTERS) as gpu:
        check(gpu, maps, affinity, beta=beta, steps=5)


BACKWARD = {
    "default": ((1, 2, 9, 11), CLUSTERS, {"steps": 40}, 5e-5),
    "by power": ((1, 2, 8, 9), CLUSTERS, {"steps": 12, "solver": "power"}, 1e-6),
    "another radius": ((2, 1, 7, 6), CLUSTERS, {"steps": 9, "radius": 3}, 5e-5),
    "more maps than one thread's": ((1, 6, 6, 7), CLUSTERS, {"steps": 9}, 5e-5),
    "one step": ((1, 2, 5, 6), CLUSTERS, {"steps": 1}, 5e-5),
    "no steps": ((1, 2, 5, 6), CLUSTERS, {"steps": 0}, 5e-5),
    "no links": ((1, 2, 4, 3), CLUSTERS, {"steps": 4, "radius": 1}, 5e-5),
    "a launch a phase": ((1, 2, 13, 24), NO_BARRIERS, {"steps": 6}, 5e-5),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_against_float64(name, library, scenes):
    shape, machine, options, tol = BACKWARD[name]
    maps, affinity = inputs(scenes, *shape, radius=options.get("radius", 5))
    grad = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    x, links = maps.double().requires_grad_(), affinity.double().requires_grad_()
    right = expected(x, links, **options)
    wanted = torch.autograd.grad(right, (x, links), grad.double(), allow_unused=True, materialize_grads=True)
    with library.run(order="random", **machine) as gpu:
        got = walk_backward(gpu, grad, maps, affinity, **options)
        if options["steps"] > 0 and machine is CLUSTERS:
            assert len(gpu.launches) == 1
        only_maps, none = walk_backward(gpu, grad, maps, affinity, wants_affinity=False, **options)
        none_either, only_affinity = walk_backward(gpu, grad, maps, affinity, wants_maps=False, **options)
    assert none is None and none_either is None
    assert torch.equal(only_maps, got[0]) and torch.equal(only_affinity, got[1])
    for result, right in zip(got, wanted, strict=True):
        if right.numel():
            assert (result - right).abs().max() <= tol * right.abs().max().clamp_min(1e-12)


def test_backward_of_maps_without_gradient(library, scenes):
    maps, affinity = inputs(scenes, 2, 2, 8, 9)
    grad = torch.ones_like(maps)
    grad[0, 1] = 0
    grad[1] = 0
    with library.run(**CLUSTERS) as gpu:
        grad_maps, grad_affinity = walk_backward(gpu, grad, maps, affinity, steps=9)
    assert (grad_maps[0, 1] == 0).all() and (grad_maps[1] == 0).all() and (grad_affinity[1] == 0).all()
    assert grad_maps[0, 0].abs().max() > 0 and grad_affinity[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 0, 6), (2, 2, 5, 0)])
def test_nothing_to_walk(shape, library):
    maps = torch.zeros(shape)
    affinity = torch.zeros(shape[0], 34, *shape[2:])
    with library.run(**CLUSTERS) as gpu:
        assert walk(gpu, maps, affinity)[0].shape == maps.shape
        _, grad_affinity = walk_backward(gpu, maps, maps, affinity)
        assert (grad_affinity == 0).all()
        assert not gpu.launches
