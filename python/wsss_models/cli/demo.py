"""`wsss demo`: weak seeds on real photographs, refined; one picture shows it, one table times it."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import wsss_kernels as wk
from wsss_models.cli.demo_scenes import CREDITS, SCENES, Scene, Stroke
from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.data.artefacts import FileError, shown, write_atomically
from wsss_models.data.files import read_picture
from wsss_models.visualise import Row, overlay_label, overlay_maps, sheet

BRUSH = 10  # pixels, width of a stroke
STRIDE = 16  # pixels a cell of the seeds: the resolution of a classifier's CAM
BLUR = 1.0  # cells, standard deviation of the blur: how far a CAM is smeared
POINT = 1 / 40  # standard deviation of a clicked point's seed, as a share of the picture's long side
OTHERS = (("par",), ("pamr",), ("crf",), ("image", "par"))  # methods shown beside the walk, as labels
COLUMNS = ("photograph", "seed", "refined map", "label")
COLOUR = (0, 230, 140)
REPEATS = 5
DENSE_GRID = (47, 63)  # what the published walk has for a picture of 375 x 500

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    row: Row
    refine_seconds: float
    label_seconds: float
    other_seconds: list[float]  # of OTHERS
    labelled: float  # share of the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("wsss_demo.png"), metavar="FILE", help="the picture to write (wsss_demo.png)")
    add("--image", type=Path, metavar="FILE", help="a picture of your own, with --point")
    add("--point", action="append", type=_point, metavar="X,Y",
        help="a click on the object, in pixels from the left and the top; may be given several times")  # fmt: skip
    add("--no-dense", action="store_true", help="skip the published dense walk (a few seconds)")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.image is None) != (arguments.point is None):
        raise UsageError("--image FILE and --point X,Y go together")
    if arguments.out.is_dir():
        raise UsageError(f"--out must be a file, got the folder {shown(arguments.out)}")
    try:
        own = arguments.image is not None
        page = _clicks(arguments.image, arguments.point) if own else _photographs(not arguments.no_dense)
        buffer = io.BytesIO()
        page.save(buffer, "PNG")
        write_atomically(arguments.out, buffer.getvalue())
    except (FileError, OSError) as error:
        print(f"failed: {error}", flush=True)
        return SOME_FAILED
    print(arguments.out.resolve())
    return DONE


def _photographs(compare: bool) -> Image.Image:
    from skimage import data  # the extra [demo]; --image does without it

    print(f"{len(SCENES)} objects; strokes by hand ({BRUSH} pixels wide), seen as a CAM shows them: cells of {STRIDE}")
    print(f"pixels, blurred by {BLUR:g} cell. The same for every photograph, with the defaults:")
    print('maps = refine_cams(seed, photograph, method="image"); label = labels_from_maps(maps)')
    print(f"Times: the shortest of {REPEATS}, {torch.get_num_threads()} threads.")
    print()
    print(f"{'object':<24}{'photograph':>12}{'strokes':>16}{'refine':>11}{'label':>10}")
    rows, seconds = [], []
    for scene in SCENES:
        photograph = _rgb(getattr(data, scene.photograph)())
        drawn = draw_strokes(scene.strokes, photograph.shape[:2])
        result = _refine(photograph, stroke_seed(drawn), scene)
        rows.append(result.row)
        seconds.append(result.other_seconds)
        share = 100 * float(drawn.mean()) / max(result.labelled, 1e-9)
        height, width = photograph.shape[:2]
        print(f"{scene.thing:<24}{f'{width} x {height}':>12}{f'{share:.1f} % of label':>16}"
              f"{1e3 * result.refine_seconds:>8.1f} ms{1e3 * result.label_seconds:>7.1f} ms", flush=True)  # fmt: skip
    names = (" + ".join(method) for method in OTHERS)
    means = (
        f"{name} {1e3 * sum(all_of) / len(all_of):.0f} ms"
        for name, all_of in zip(names, zip(*seconds, strict=True), strict=True)
    )
    print(f"\nThe other methods on the picture, from the same seeds, on average: {', '.join(means)}.")
    print("\nPhotographs, bundled with scikit-image:")
    for name, credit in CREDITS.items():
        print(f"  {name}: {credit}")
    footer = [
        f"wsss-kernels {wk.__version__}; strokes of {BRUSH} pixels as a CAM of stride {STRIDE}; defaults everywhere."
    ]
    if compare:
        line = _against_dense(_rgb(data.coffee()))
        print(f"\n{line}")
        footer.append(line)
    return sheet("From weak seeds to labels, without training", _columns(), rows, footer)


def _clicks(path: Path, points: Sequence[tuple[float, float]]) -> Image.Image:
    photograph = read_picture(path)
    height, width = photograph.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"--point must lie in the picture (0..{width - 1}, 0..{height - 1}), got {x:g},{y:g}")
    where = " ".join(f"({x:g}, {y:g})" for x, y in points)
    scene = Scene(path.name, shown(path.name), (), f"{len(points)} x click: {where}")
    result = _refine(photograph, point_seed(points, (height, width)), scene)
    sigma = POINT * max(height, width)
    print(f"{shown(path)}: {width} x {height}; seed: a Gaussian of {sigma:.1f} pixels at each point; "
          f"refined in {1e3 * result.refine_seconds:.1f} ms, {100 * result.labelled:.1f} % labelled")  # fmt: skip
    return sheet("From a click to a label", _columns(), [result.row])


def _columns() -> list[str]:
    return [*COLUMNS, *(f"label by {' + '.join(method)}" for method in OTHERS)]


def _refine(photograph: np.ndarray, seed: Tensor, scene: Scene) -> Result:
    picture = torch.from_numpy(photograph).permute(2, 0, 1)
    maps, refine_seconds = _timed(lambda: _refined(seed, picture))
    label, label_seconds = _timed(lambda: torch.as_tensor(wk.labels_from_maps(maps)))
    others = [_timed(partial(_refined, seed, picture, method), repeats=1) for method in OTHERS]
    size = photograph.shape[:2]
    coarse = F.interpolate(seed[None], size, mode="bilinear", align_corners=False)[0]
    panels = (
        photograph,
        overlay_maps(photograph, coarse.numpy(), [COLOUR]),
        overlay_maps(photograph, maps.numpy(), [COLOUR]),
        *(
            overlay_label(photograph, labels.numpy(), [COLOUR])
            for labels in (label, *(torch.as_tensor(wk.labels_from_maps(other)) for other, _ in others))
        ),
    )
    row = Row(scene.thing, scene.note, panels)
    return Result(
        row, refine_seconds, label_seconds, [seconds for _, seconds in others], float((label > 0).float().mean())
    )


def _refined(seed: Tensor, picture: Tensor, method: str | tuple[str, ...] = "image") -> Tensor:
    maps = wk.refine_cams(seed, picture, method=method, size="feats")
    assert isinstance(maps, Tensor)
    return maps


def draw_strokes(strokes: Sequence[Stroke], size: tuple[int, int], brush: int = BRUSH) -> np.ndarray:
    """[H, W] bool: what a round brush of `brush` pixels covers along the strokes."""
    canvas = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        draw.line(stroke, fill=1, width=brush, joint="curve")
        for x, y in (stroke[0], stroke[-1]):
            draw.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    return np.array(canvas)


def stroke_seed(drawn: np.ndarray) -> Tensor:
    """[H, W] bool -> [1, ceil(H / STRIDE), ceil(W / STRIDE)], peak 1: covered share of each cell, blurred by BLUR."""
    height, width = drawn.shape
    grid = (-(-height // STRIDE), -(-width // STRIDE))
    cells = F.adaptive_avg_pool2d(torch.from_numpy(drawn)[None, None].float(), grid)
    reach = int(3 * BLUR)
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * BLUR**2))
    taps = taps / taps.sum()
    across = F.conv2d(cells, taps.view(1, 1, 1, -1), padding=(0, reach))
    blurred = F.conv2d(across, taps.view(1, 1, -1, 1), padding=(reach, 0))
    return blurred[0] / blurred.max().clamp_min(1e-12)


def point_seed(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> Tensor:
    """[1, H, W], peak 1: at each (x, y) a Gaussian of standard deviation POINT x the long side, the largest of them."""
    ys, xs = torch.arange(size[0]).view(-1, 1), torch.arange(size[1]).view(1, -1)
    sigma = POINT * max(size)
    blobs = [torch.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * sigma**2)) for x, y in points]
    return torch.stack(blobs).amax(dim=0, keepdim=True)


def dense_walk(maps: Tensor, affinity: Tensor, radius: int = 5, beta: float = 8.0, squarings: int = 8) -> Tensor:
    """The walk as published: an n x n transition matrix, squared until it holds 2^squarings steps.

    maps [1, C, H, W], affinity [1, K, H, W] -> [1, C, H, W]. Memory: three matrices of n = H W rows.
    Source: Ahn and Kwak, CVPR 2018, section 3.4.
    """
    channels, height, width = maps.shape[1:]
    index = torch.arange(height * width).view(height, width)
    matrix = torch.eye(height * width)
    for plane, (dy, dx) in zip(affinity[0] ** beta, wk.neighbour_offsets(radius), strict=True):
        ys, xs = slice(0, max(0, height - dy)), slice(max(0, -dx), width - max(0, dx))
        here = index[ys, xs].flatten()
        there = index[dy:, xs.start + dx : xs.stop + dx].flatten()
        matrix[here, there] = matrix[there, here] = plane[ys, xs].flatten()
    matrix /= matrix.sum(dim=1, keepdim=True)
    for _ in range(squarings):
        matrix = matrix @ matrix
    return (matrix @ maps[0].flatten(1).T).T.reshape(1, channels, height, width)


def _against_dense(photograph: np.ndarray) -> str:
    """Both on one affinity of one photograph; equal first, then timed."""
    from wsss_kernels.colour import walk_features

    picture = torch.from_numpy(photograph).permute(2, 0, 1)[None]
    affinity = wk.local_affinity(walk_features(picture, DENSE_GRID))
    seed = torch.rand(1, 2, *DENSE_GRID, generator=torch.Generator().manual_seed(0))
    dense, dense_seconds = _timed(lambda: dense_walk(seed, affinity), repeats=1)
    ours, seconds = _timed(lambda: wk.random_walk(seed, affinity, steps=256), repeats=20)
    error = float((ours - dense).abs().max())
    height, width = DENSE_GRID
    where = f"walk of 256 steps, 2 maps of {height} x {width}, {torch.get_num_threads()} threads"
    if error > 1e-3:
        return f"{where}: random_walk differs from the dense walk by {error:.1e}; no time is compared"
    return (
        f"{where}: random_walk {1e3 * seconds:.2f} ms, published dense matrix with 8 squarings in torch "
        f"{1e3 * dense_seconds:.0f} ms: {dense_seconds / seconds:,.0f} times faster; largest difference {error:.0e}."
    )


def _timed(call: Callable[[], T], repeats: int = REPEATS) -> tuple[T, float]:
    """Result and the shortest of `repeats` times, in seconds."""
    shortest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        shortest = min(shortest, time.perf_counter() - start)
    return result, shortest


def _rgb(photograph: np.ndarray) -> np.ndarray:
    colours = photograph[..., None].repeat(3, axis=2) if photograph.ndim == 2 else photograph[..., :3]
    return np.ascontiguousarray(colours)


def _point(text: str) -> tuple[float, float]:
    x, _, y = text.partition(",")
    try:
        return float(x), float(y)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be X,Y in pixels, such as 120,80, got {text!r}") from None
