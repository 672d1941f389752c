"""A contact sheet of `wsss refine`: photographs, their seeds, and the labels of several methods side by side."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import wsss_kernels as wk
from wsss_models.cli.pictures import Job
from wsss_models.cli.refine_jobs import Settings, read, refine_together
from wsss_models.data.artefacts import shown, write_atomically
from wsss_models.data.palette import voc_palette
from wsss_models.visualise import Row, overlay_label, overlay_maps, sheet

ROWS = 8  # pictures on a sheet
PANEL = 480  # pixels of a panel's long side that are refined; larger pictures are reduced first


def write_sheet(
    path: Path,
    jobs: Sequence[Job],
    settings: Settings,
    chains: Sequence[tuple[str, ...]],
    num_classes: int,
    device: torch.device,
) -> int:
    """One row a picture: the photograph, its seed, and the label of each chain of methods.

    Args:
        path: of the PNG.
        jobs: the pictures; one that cannot be read or refined is left out.
        settings: as for the labels; of the first chain, method and features too.
        chains: methods beside that of `settings`, all from the picture alone.
        num_classes, device: as for the labels.

    Returns:
        int: how many pictures are on it.
    """
    rows = []
    for job in jobs:
        with contextlib.suppress(ValueError, TypeError, RuntimeError, OSError, MemoryError):
            rows.append(_row(job, settings, chains, num_classes, device))
    columns = ["photograph", "seed", *(" + ".join(chain) for chain in (settings.method, *chains))]
    threshold = "the label-free threshold" if settings.background == "auto" else f"threshold {settings.background}"
    footer = [f"wsss-kernels {wk.__version__}; every method with its defaults, {threshold}"]
    buffer = io.BytesIO()
    sheet(f"{len(rows)} pictures, refined", columns, rows, footer).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return len(rows)


def _row(
    job: Job, settings: Settings, chains: Sequence[tuple[str, ...]], num_classes: int, device: torch.device
) -> Row:
    item = read(job, num_classes, settings)
    scale = PANEL / max(item.picture.shape[-2:])
    if scale < 1:  # what a panel shows needs no more, and a tiled picture would take minutes a method
        height, width = (max(1, round(scale * n)) for n in item.picture.shape[-2:])
        image = Image.fromarray(item.picture.permute(1, 2, 0).contiguous().numpy())
        reduced = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BOX)))
        item = replace(item, picture=reduced.permute(2, 0, 1))
    photograph = item.picture.permute(1, 2, 0).contiguous().numpy()
    ids = item.class_ids.tolist()
    colours = [(int(r), int(g), int(b)) for r, g, b in voc_palette()[ids]]
    seeds = photograph
    if ids:
        maps = F.interpolate(item.cams[None], photograph.shape[:2], mode="bilinear", align_corners=False)[0]
        seeds = overlay_maps(photograph, (maps / maps.max().clamp_min(1e-12)).numpy(), colours)
    panels = [photograph, seeds]
    own = replace(settings, size="image", tile=None)
    for variant in (own, *(replace(own, method=chain, uses_features=False) for chain in chains)):
        label = refine_together([item], variant, device)[0][1]
        index = np.zeros(256, dtype=np.int64)
        index[ids] = 1 + np.arange(len(ids))
        panels.append(overlay_label(photograph, index[label], colours))
    return Row(shown(job.name), f"classes {', '.join(map(str, ids))}" if ids else "no class", panels)
