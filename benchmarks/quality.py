"""How good the refiners are on real pictures: mIoU of the seeds and of every method with nothing tuned.

    python -m benchmarks quality --data DIR [--seeds cams cams_tip ...] [--methods image ...] [--picture FILE]

DIR is in PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png (index PNG, 255 ignored), optionally
ImageSets/**/*.txt with one ID a line, and one or more folders of seeds, ID.npz with `class_ids` int [k] and `cams`
float [k, h, w]. For each kind of seed the table gives the mIoU at the best single threshold of the whole set (which
needs the ground truth) and with the label-free threshold; "loss" is the difference. "wins" counts the pictures on which
the method, label-free, has a higher mIoU than the seeds at their best threshold. --picture draws the labels of all of
them beside the ground truth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from wsss_models.data.palette import voc_palette
from wsss_models.visualise import Row as Line
from wsss_models.visualise import overlay_label, sheet

import wsss_kernels as wk

# Every method from the picture alone, with its defaults, and chains of them: (name, arguments of refine_cams).
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("image", {"method": "image"}),
    ("par", {"method": "par"}),
    ("pamr", {"method": "pamr"}),
    ("crf", {"method": "crf"}),
    ("image, par", {"method": ("image", "par")}),
    ("image, par x 2", {"method": ("image", "par"), "iterations": 2}),
    ("image, crf", {"method": ("image", "crf")}),
    ("image, par, crf", {"method": ("image", "par", "crf"), "iterations": 5}),
)

THRESHOLDS = torch.arange(1, 100) / 100  # of the image's maximum, for the best single threshold
IGNORE = 255
CLASSES = 256


@dataclass(frozen=True)
class Picture:
    name: str
    rgb: Tensor  # [1, 3, H, W] uint8
    truth: Tensor  # [H, W] int64


@dataclass(frozen=True)
class Row:
    seeds: str
    method: str
    best: float  # percent
    best_threshold: float
    label_free: float  # percent
    seconds: float  # mean an image, refinement and labels, reading not counted
    images: int
    wins: int  # images on which it is better label-free than the seeds at their best


@dataclass(frozen=True)
class Evaluation:
    """What a row is made of, and what the next rows are compared with."""

    row: Row
    at_best: list[float]  # mIoU of each image at the best threshold of the set
    labels: list[Tensor]  # of each image, label-free


def image_ids(data: Path) -> list[str]:
    """The IDs named by ImageSets, else every picture that has a ground truth."""
    listed = sorted((data / "ImageSets").rglob("*.txt"))
    if listed:
        lines = [line.split() for path in listed for line in path.read_text().splitlines()]
        return list(dict.fromkeys(words[0] for words in lines if words))
    return sorted(path.stem for path in (data / "SegmentationClass").glob("*.png"))


def seed_folders(data: Path) -> list[str]:
    return sorted(path.name for path in data.iterdir() if path.is_dir() and next(path.glob("*.npz"), None) is not None)


def read_picture(data: Path, name: str) -> Picture:
    with Image.open(data / "JPEGImages" / f"{name}.jpg") as image:
        rgb = np.array(image.convert("RGB"))
    with Image.open(data / "SegmentationClass" / f"{name}.png") as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"{name}.png must be an index PNG (mode P or L), got mode {image.mode}")
        truth = np.array(image)
    return Picture(name, torch.from_numpy(rgb).permute(2, 0, 1)[None], torch.from_numpy(truth).long())


def read_seeds(data: Path, folder: str, name: str) -> tuple[Tensor, Tensor]:
    """class_ids [k] int64 and cams [1, k, h, w] float32."""
    with np.load(data / folder / f"{name}.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["class_ids"].astype(np.int64)), torch.from_numpy(file["cams"]).float()[None]


def confusion(truth: Tensor, labels: Tensor) -> Tensor:
    """[256, 256] counts, row = ground truth, column = label; 255 in the ground truth is left out."""
    valid = truth != IGNORE
    return torch.bincount(truth[valid] * CLASSES + labels[valid], minlength=CLASSES**2).view(CLASSES, CLASSES)


def sweep_confusion(truth: Tensor, maps: Tensor, class_ids: Tensor) -> Tensor:
    """[T, 256, 256] counts for every threshold at once: a threshold only moves pixels to the background."""
    valid = truth != IGNORE
    steps = len(THRESHOLDS) + 1
    counts = torch.zeros(len(THRESHOLDS), CLASSES, CLASSES, dtype=torch.int64)
    if maps.shape[1] == 0:
        counts[:, :, 0] = torch.bincount(truth[valid], minlength=CLASSES)
        return counts
    score, index = (maps[0] / maps.amax().clamp_min(1e-12)).max(dim=0)
    passed = torch.bucketize(score[valid], THRESHOLDS)  # how many thresholds the score exceeds, 0..T
    seen, row = torch.unique(truth[valid], return_inverse=True)
    key = (row * len(class_ids) + index[valid]) * steps + passed
    table = torch.bincount(key, minlength=len(seen) * len(class_ids) * steps).view(len(seen), len(class_ids), steps)
    kept = table.flip(2).cumsum(2).flip(2)[..., 1:]  # [classes seen, k, T] pixels above each threshold
    counts[:, seen, 0] = (table.sum(2, keepdim=True) - kept).sum(1).T
    for i, class_id in enumerate(class_ids.tolist()):
        counts[:, seen, class_id] += kept[:, i].T
    return counts


def mean_iou(counts: Tensor) -> float:
    """Mean of TP / (GT + Pred - TP) over the classes of the ground truth, background included; percent."""
    truth, labels, hit = counts.sum(1).double(), counts.sum(0).double(), counts.diagonal().double()
    present = truth > 0
    return 100 * float((hit / (truth + labels - hit))[present].mean()) if bool(present.any()) else float("nan")


def to_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def evaluate(
    pictures: list[Picture],
    data: Path,
    folder: str,
    method: str,
    arguments: dict[str, Any] | None,
    seeds: Evaluation | None = None,
) -> Evaluation:
    """One row of the table; arguments None = the seeds as they are, brought to the picture bilinearly.

    `seeds`: the evaluation of the same pictures that wins are counted against; None = this one.
    """
    sweep = torch.zeros(len(THRESHOLDS), CLASSES, CLASSES, dtype=torch.int64)
    free = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    seconds, labels, at, alone = 0.0, [], [], []
    for picture in pictures:
        if not (data / folder / f"{picture.name}.npz").exists():
            continue
        ids, cams = read_seeds(data, folder, picture.name)
        size = (picture.truth.shape[0], picture.truth.shape[1])
        start = time.perf_counter()
        maps = to_size(cams, size) if arguments is None else wk.refine_cams(cams, picture.rgb, size=size, **arguments)
        assert isinstance(maps, Tensor)  # a tensor in, a tensor out
        label = torch.as_tensor(wk.labels_from_maps(maps, background="auto", class_ids=ids))[0]
        seconds += time.perf_counter() - start
        labels.append(label)
        own, own_sweep = confusion(picture.truth, label), sweep_confusion(picture.truth, maps, ids)
        free += own
        sweep += own_sweep
        alone.append(mean_iou(own))
        at.append([mean_iou(counts) for counts in own_sweep])
    scores = [mean_iou(counts) for counts in sweep]
    top = int(np.argmax(scores))
    at_best = [each[top] for each in at]
    wins = sum(a > b for a, b in zip(alone, seeds.at_best if seeds is not None else at_best, strict=True))
    used = len(labels)
    best = (scores[top], float(THRESHOLDS[top]))
    return Evaluation(Row(folder, method, *best, mean_iou(free), seconds / max(used, 1), used, wins), at_best, labels)


def table(rows: list[Row]) -> str:
    head = f"{'seeds':<14}{'method':<18}{'best':>7}{'at':>6}{'label-free':>12}{'loss':>7}{'wins':>9}{'s/image':>10}"
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r.seeds:<14}{r.method:<18}{r.best:>7.1f}{r.best_threshold:>6.2f}{r.label_free:>12.1f}"
            f"{r.best - r.label_free:>7.1f}{f'{r.wins} of {r.images}':>9}{r.seconds:>10.4f}"
        )
    return "\n".join(lines)


def draw(pictures: list[Picture], data: Path, evaluations: list[Evaluation]) -> Image.Image:
    """A line a picture and kind of seed: photograph, ground truth, the label-free labels of every method."""
    palette = [(int(r), int(g), int(b)) for r, g, b in voc_palette()]
    lines = []
    for folder in dict.fromkeys(evaluation.row.seeds for evaluation in evaluations):
        own = [evaluation for evaluation in evaluations if evaluation.row.seeds == folder]
        seeded = [picture for picture in pictures if (data / folder / f"{picture.name}.npz").exists()]
        for i, picture in enumerate(seeded):
            photograph = picture.rgb[0].permute(1, 2, 0).contiguous().numpy()
            panels = [photograph]
            for label in (picture.truth, *(evaluation.labels[i] for evaluation in own)):
                ids = [c for c in torch.unique(label).tolist() if 0 < c < IGNORE]
                index = np.zeros(CLASSES, dtype=np.int64)
                index[ids] = 1 + np.arange(len(ids))
                panels.append(overlay_label(photograph, index[label.numpy()], [palette[c] for c in ids]))
            lines.append(Line(f"{picture.name}, {folder}", "", panels))
    names = list(dict.fromkeys(evaluation.row.method for evaluation in evaluations))
    return sheet("Labels without any threshold chosen", ["photograph", "ground truth", *names], lines, width=240)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in PASCAL VOC layout with seed folders")
    parser.add_argument("--seeds", nargs="+", help="seed folders inside DATA (default: every folder with .npz files)")
    parser.add_argument("--methods", nargs="+", choices=[name for name, _ in METHODS], help="default: all")
    parser.add_argument("--limit", type=int, help="only the first N pictures")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the labels of every row, one line a seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of the table")
    options = parser.parse_args(argv)

    data: Path = options.data
    for needed in ("JPEGImages", "SegmentationClass"):
        if not (data / needed).is_dir():
            print(f"--data must hold {needed}/, got {data}", file=sys.stderr)
            return 2
    folders = options.seeds or seed_folders(data)
    missing = [folder for folder in folders if not (data / folder).is_dir()]
    if missing or not folders:
        print(f"--seeds must name folders of .npz files in {data}, got {missing or 'none'}", file=sys.stderr)
        return 2
    pictures = [read_picture(data, name) for name in image_ids(data)[: options.limit]]
    chosen = [(name, arguments) for name, arguments in METHODS if not options.methods or name in options.methods]
    evaluations = []
    for folder in folders:
        seeds = evaluate(pictures, data, folder, "(seeds)", None)
        evaluations += [seeds, *(evaluate(pictures, data, folder, *method, seeds) for method in chosen)]
    rows = [evaluation.row for evaluation in evaluations]
    if options.picture is not None:
        draw(pictures, data, evaluations).save(options.picture)
    print("\n".join(json.dumps(asdict(row)) for row in rows) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
