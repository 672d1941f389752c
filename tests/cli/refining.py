"""A small set of pictures and maps, `wsss refine` on it and what that wrote, for the tests of the command."""

from pathlib import Path

import numpy as np
from PIL import Image
from wsss_models.cli.main import main

SIZES = ((40, 56), (56, 40), (33, 47), (48, 48))


def make_set(root: Path, count: int = 6, feats: bool = False, seed: int = 0) -> Path:
    """Small pictures of a bright disc, a coarse map on it, and features."""
    rng = np.random.default_rng(seed)
    for name in ("images", "cams", "feats"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        ys, xs = np.mgrid[:height, :width]
        disc = (ys - height / 2) ** 2 + (xs - width / 2) ** 2 < (min(height, width) / 3) ** 2
        picture = np.where(disc[..., None], (220, 60, 40), (30, 90, 60)) + rng.integers(-9, 10, (height, width, 3))
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"p{i:02d}.png")
        cams = rng.random((2, 5, 6)).astype(np.float32) * 0.1
        cams[0, 2:3, 2:4] = 1
        np.savez(root / "cams" / f"p{i:02d}.npz", class_ids=[5 + i, 2], cams=cams)
        if feats:
            maps = np.stack([disc[::4, ::4], ~disc[::4, ::4]]).astype(np.float32)
            np.save(root / "feats" / f"p{i:02d}.npy", 1e3 * maps + rng.random(maps.shape).astype(np.float32))
    return root


def refine(root: Path, *more: str, out: str = "out") -> int:
    return main(["refine", "--images", f"{root}/images", "--cams", f"{root}/cams", "--out", f"{root}/{out}", *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def label(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)
