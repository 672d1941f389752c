"""A run folder, or several, as one HTML page that needs no other file: scores, curves, pictures, settings."""

from __future__ import annotations

import base64
import colorsys
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.dataset import list_splits, open_dataset
from wsss_models.data.files import read_maps
from wsss_models.data.folder import list_files
from wsss_models.data.masks import IGNORE, read_mask
from wsss_models.data.pictures import PictureSet
from wsss_models.evaluate import Confusion, evaluate_labels, evaluate_maps
from wsss_models.report_charts import Curve
from wsss_models.systems import ONE_STAGE, TRAINED
from wsss_models.train import LOG, MANIFEST
from wsss_models.visualise import overlay_label, overlay_maps

RESULTS = "results.json"
TRAININGS = ("classifier", "affinity", "deeplab")  # in the order of a run; others are shown after them
OUTPUTS = {  # folder -> title, in the order of a run
    "cams": "CAM",
    "refined": "refined",
    "labels": "pseudo-label",
    "segmentation": "segmentation",  # where it holds neither of the next
    "segmentation/mcic": "segmentation, one stage",
    "segmentation/mcic-crf": "segmentation, one stage, CRF",
    "segmentation/mean": "segmentation",
    "segmentation/crf": "segmentation, CRF",
}
THUMBNAIL = 320  # pixels of a picture's long side on the page
_QUALITY = 80  # of its JPEG
_NO_LOSSES = ("step", "lr", "rate", "seconds")  # what else a line of the log holds
_OF_THE_FILE = (ValueError, OSError, MemoryError)


@dataclass(frozen=True)
class Run:
    """What is in a run folder, but for the pictures."""

    path: Path
    name: str  # differs between the runs of a page
    results: dict[str, Any]
    manifests: dict[str, dict[str, Any]]  # of the trainings
    curves: dict[str, dict[str, Curve]]  # training -> loss term -> points
    outputs: dict[str, dict[str, Path]]  # folder of OUTPUTS -> id -> file
    problems: list[str]

    @property
    def missing(self) -> list[str]:
        """What the run has not got, but for what its refiner does without."""
        refiner = self.results.get("refiner")
        spare = set()
        if refiner is not None:
            spare = {"refined"} if refiner in TRAINED else {"affinity"}
            if refiner in (*ONE_STAGE, "none"):
                spare = {"affinity", "refined"}
        stages = [name for name in (*TRAININGS, *OUTPUTS) if "/" not in name and name not in spare]
        return [name for name in stages if not (self.path / name).is_dir()]


@dataclass(frozen=True)
class Panel:
    """A picture on the page."""

    title: str
    jpeg: str = ""  # base64; "" where there is none
    size: tuple[int, int] = (0, 0)  # width, height
    note: str = ""  # why there is none


@dataclass(frozen=True)
class Case:
    """A picture of the set: itself and its truth, and what each run made of it."""

    name: str
    classes: list[str]
    scores: list[float | None]  # a run each
    photograph: Panel
    truth: Panel
    made: list[list[Panel]]  # [runs][outputs]


@dataclass(frozen=True)
class Gallery:
    """Pictures of a split."""

    title: str
    about: str
    colours: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # class -> its colour in the overlays
    scored: list[str] = field(default_factory=list)  # a run each: what the scores are of
    sections: dict[str, list[Case]] = field(default_factory=dict)  # heading -> pictures


def read_run(path: Path | str) -> Run:
    """What `wsss run` left, as far as it got.

    Args:
        path: the folder; it must hold results.json, everything else may be missing.

    Raises:
        FileError: no folder, or results.json is missing or of another form; names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileError(path, "no such folder" if not path.exists() else "not a folder")
    results = _read_results(path / RESULTS)
    problems: list[str] = []
    manifests, curves = {}, {}
    folders = {child.name for child in path.iterdir() if (child / MANIFEST).is_file() or (child / LOG).is_file()}
    for name in _in_order(folders):
        try:
            if (path / name / MANIFEST).is_file():
                manifests[name] = _read_object(path / name / MANIFEST)
            if (path / name / LOG).is_file():
                curves[name] = read_log(path / name / LOG)
        except FileError as error:
            problems.append(str(error))
    outputs = {name: _files(path / name) for name in OUTPUTS if (path / name).is_dir()}
    if any(name.startswith("segmentation/") for name in outputs):
        del outputs["segmentation"]
    return Run(path, shown(str(results.get("system", path.name))), results, manifests, curves, outputs, problems)


def read_log(path: Path) -> dict[str, Curve]:
    """The loss terms of a training's log.jsonl; a line that was cut short is left out, and the total of one term.

    Raises:
        FileError: the file cannot be read.
    """
    curves: dict[str, dict[float, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None
    for line in lines:
        try:
            values = json.loads(line)
            step = float(values["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in values.items():
            if name not in _NO_LOSSES and _is_number(value) and math.isfinite(step):
                curves.setdefault(name, {})[step] = float(value)
    terms = {name: sorted(points.items()) for name, points in curves.items()}
    if len(terms) == 2 and "total" in terms and terms["total"] in [terms[name] for name in terms if name != "total"]:
        del terms["total"]  # of one term
    return terms


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """As `read_run`; runs of one system are told apart by their folders. Raises as `read_run`."""
    runs = [read_run(path) for path in paths]
    for tell in (lambda run: run.path.resolve().name, lambda run: str(run.path)):
        names = [run.name for run in runs]
        systems = [shown(str(run.results.get("system", ""))) for run in runs]
        runs = [
            replace(run, name=shown(f"{system} {tell(run)}".strip())) if names.count(run.name) > 1 else run
            for run, system in zip(runs, systems, strict=True)
        ]
    return runs


def open_pictures(runs: Sequence[Run], data: Path | None, split: str | None) -> list[PictureSet]:
    """The sets of the runs' pictures, one a split.

    Args:
        runs: of one set, which their results name.
        data: the set's folder, where it is not (or no longer) that of the results.
        split: None = those of the results, in their order; all pictures where the set knows none of them.

    Raises:
        FileError: the set cannot be opened.
        ValueError: the runs are of different sets.
    """
    named = {str(run.results.get("data", "")): None for run in runs}
    if data is None and len(named) > 1:
        raise ValueError(
            f"the runs must be of one set of pictures, got {', '.join(map(shown, named))} (or give --data)"
        )
    root = Path(next(iter(named)) or "?") if data is None else data
    if split is not None:
        return [open_dataset(root, split)]
    known = list_splits(root)
    splits = dict.fromkeys(row.get("split") for run in runs for row in run.results["rows"])
    return [open_dataset(root, name) for name in splits if name in known] or [open_dataset(root)]


def make_gallery(
    runs: Sequence[Run],
    pictures: PictureSet,
    count: int,
    *,
    failed: Callable[[str, str], None] = lambda name, reason: None,
    advance: Callable[[], None] = lambda: None,
) -> Gallery:
    """The pictures with the lowest and the highest scores.

    A picture's score is the mean IoU of its own pixels (`evaluate.Confusion.mean_iou`) in the last output that the run
    has of the set: label pictures as they are (255 counts as background), maps at their label-free threshold. With
    several runs pictures are ordered by the mean of their scores.

    Args:
        runs: of one set.
        pictures: the set.
        count: pictures on the page; half of them the worst.
        failed: called with the id and the reason where a file cannot be used.
        advance: called once a picture of the set.
    """
    last = [_last_output(run, pictures) for run in runs]
    scores: list[list[float | None]] = []
    totals = [Confusion(len(pictures.classes)) for _ in runs]
    for i in range(len(pictures)):
        scores.append([_score(r, f, pictures, i, t, failed) for r, f, t in zip(runs, last, totals, strict=True)])
        advance()
    known = [i for i in range(len(pictures)) if any(s is not None for s in scores[i])]
    known.sort(key=lambda i: (_mean(scores[i]), pictures.ids[i]))
    made = {name for run, folder in zip(runs, last, strict=True) for name in run.outputs.get(folder, ())}
    others = [i for i in range(len(pictures)) if i not in set(known)]
    others.sort(key=lambda i: pictures.ids[i] not in made)
    shown_count = min(count, len(known))
    worst = known[: (shown_count + 1) // 2]
    best = known[len(known) - shown_count // 2 :][::-1]
    rest = others[: count - shown_count]
    sections = {"Lowest scores": worst, "Highest scores": best, "Without a score": rest}
    scored = [
        f"{OUTPUTS[folder]}, mean IoU {100 * total.mean_iou():.2f} %" if total.counts.any() else ""
        for folder, total in zip(last, totals, strict=True)
    ]
    ids = set(pictures.ids)
    folders = [  # the same of every run: CAM under CAM
        folder for folder in OUTPUTS if any(not ids.isdisjoint(run.outputs.get(folder, ())) for run in runs)
    ]
    cases = {
        heading: [_case(runs, pictures, i, scores[i], folders, failed) for i in numbers]
        for heading, numbers in sections.items()
        if numbers
    }
    colours = {name: _colour(c) for c, name in enumerate(pictures.classes, start=1)}
    title = f"Split {pictures.split}" if pictures.split else "All pictures"
    about = f"{len(pictures)} pictures, {len(known)} with a score"
    return Gallery(title, about, colours, scored, cases)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(path, "no such file") from None
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"must be JSON ({error})") from None
    if not isinstance(values, dict):
        raise FileError(path, f"must be a JSON object, got {type(values).__name__}")
    return values


def _read_results(path: Path) -> dict[str, Any]:
    results = _read_object(path)
    rows = results.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileError(path, "rows must be a list of objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("per_class", {}), dict):
            raise FileError(path, f"row {number}: per_class must be an object, got {row['per_class']!r}")
        for name, value in {"miou": row.get("miou"), **row.get("per_class", {})}.items():
            if value is not None and not isinstance(value, (int, float)):
                raise FileError(path, f"row {number}: {shown(name)} must be a number or null, got {value!r}")
    if not isinstance(results.setdefault("stages", {}), dict):
        raise FileError(path, f"stages must be an object, got {results['stages']!r}")
    return results


def _in_order(folders: set[str]) -> list[str]:
    """As in a run: rounds come after the classifier that they start from."""
    rounds = sorted((n for n in folders if re.fullmatch(r"round\d+", n)), key=lambda n: int(n[5:]))
    first, *later = TRAININGS
    return [n for n in (first, *rounds, *later) if n in folders] + sorted(folders.difference(TRAININGS, rounds))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _files(folder: Path) -> dict[str, Path]:
    """id -> its maps, or else its label picture."""
    found = list_files(folder, (".npz", ".png"))
    chosen = {name: [p for p in paths if p.suffix in (".npz", ".png")] for name, paths in found.items()}
    return {name: paths[0] for name, paths in chosen.items() if paths}  # sorted: .npz first


def _last_output(run: Run, pictures: PictureSet) -> str:
    """The last of OUTPUTS that has a file of the set."""
    ids = set(pictures.ids)
    having = [name for name in OUTPUTS if not ids.isdisjoint(run.outputs.get(name, ()))]
    return having[-1] if having else ""


def _score(
    run: Run, folder: str, pictures: PictureSet, i: int, total: Confusion, failed: Callable[[str, str], None]
) -> float | None:
    path = run.outputs.get(folder, {}).get(pictures.ids[i])
    if path is None or not pictures.has_mask(i):
        return None
    evaluate = evaluate_labels if path.suffix == ".png" else evaluate_maps
    result = evaluate(pictures, run.path / folder, numbers=[i])
    for name, reason in result.failed:
        failed(name, reason)
    total += result.confusion
    score = result.confusion.mean_iou()
    return None if math.isnan(score) else score


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known)


def _case(
    runs: Sequence[Run],
    pictures: PictureSet,
    i: int,
    scores: list[float | None],
    folders: Sequence[str],
    failed: Callable[[str, str], None],
) -> Case:
    name = pictures.ids[i]

    def panel(title: str, draw: Callable[[], np.ndarray | None], absent: str) -> Panel:
        try:
            drawn = draw()
        except _OF_THE_FILE as error:
            failed(name, str(error) or "not enough memory")
            return Panel(title, note="cannot be read")
        return Panel(title, note=absent) if drawn is None else Panel(title, jpeg(drawn), drawn.shape[1::-1])

    photograph: np.ndarray | None = None

    def read() -> np.ndarray:
        nonlocal photograph
        photograph = reduced(pictures.image(i))
        return photograph

    def truth() -> np.ndarray | None:
        mask = pictures.mask(i)
        return None if mask is None or photograph is None else _label_over(photograph, mask)

    def output(path: Path | None) -> np.ndarray | None:
        if path is None or photograph is None:
            return None
        if path.suffix == ".png":
            return _label_over(photograph, read_mask(path))
        return _maps_over(photograph, *read_maps(path))

    first = panel("photograph", read, "")
    try:
        classes = [pictures.classes[c - 1] for c in pictures.class_ids(i)]
    except _OF_THE_FILE as error:
        failed(name, str(error))
        classes = []
    made = [
        [
            panel(OUTPUTS[folder], partial(output, run.outputs.get(folder, {}).get(name)), "none of this picture")
            for folder in folders
        ]
        for run in runs
    ]
    return Case(name, classes, scores, first, panel("ground truth", truth, "no ground truth"), made)


def reduced(picture: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """[H, W, 3] uint8, the long side at most `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _label_over(picture: np.ndarray, label: np.ndarray) -> np.ndarray:
    size = (picture.shape[1], picture.shape[0])
    label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    ids = [int(c) for c in np.unique(label) if c not in (0, IGNORE)]
    index = np.zeros(256, dtype=np.int64)
    index[ids] = 1 + np.arange(len(ids))
    index[IGNORE] = IGNORE
    return overlay_label(picture, index[label], [_colour(c) for c in ids])


def _maps_over(picture: np.ndarray, class_ids: np.ndarray, cams: np.ndarray) -> np.ndarray:
    if not len(class_ids):
        return overlay_maps(picture, np.zeros((0, *picture.shape[:2])), [])
    maps = torch.from_numpy(cams).clamp_min(0)
    maps = F.interpolate(maps[None], picture.shape[:2], mode="bilinear", align_corners=False)[0]
    maps /= maps.max().clamp_min(1e-12)
    return overlay_maps(picture, maps.numpy(), [_colour(int(c)) for c in class_ids])


def _colour(class_id: int) -> tuple[int, int, int]:
    """Light enough for a dark page, too, as VOC's are not; neighbouring ids are far apart on the circle of hues."""
    hue, lightness = 0.618034 * class_id % 1, 0.64 if class_id % 2 else 0.5
    red, green, blue = (round(255 * x) for x in colorsys.hls_to_rgb(hue, lightness, 0.9))
    return red, green, blue


def jpeg(picture: np.ndarray) -> str:
    """Base64."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
