"""A generated set with known masks: textured objects on textured grounds, told apart by a small part each."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from wsss_models.data.artefacts import FileError, write_atomically
from wsss_models.data.lists import CLASSES_FILE
from wsss_models.data.palette import voc_palette
from wsss_models.data.textures import GRAINS, PATTERNS, SHAPES, grain_bank, ground_bank

MIN_CLASSES, MAX_CLASSES = 3, 20
MIN_SIZE = 48  # pixels of a side: below, a part has no pixels left for its pattern
# fmt: off
NAMES = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon",
)
# fmt: on
_FORMAT = 1  # raised when the same settings give other pictures
_RECORD = "synth.json"  # written last: what is in the folder, and that it is complete
_RADIUS = (0.20, 0.36)  # of an object's body, of the picture's shorter side
_PART = 0.36  # radius of the part, of the body's
_OWN_GRAIN = 0.7  # how often a body has the grain of its class; that is shared by other classes too
_LEAST_VISIBLE = 0.5  # of a body and of its part: objects that would hide more are not placed
_TRIES = 6


@dataclass(frozen=True)
class Settings:
    """What decides the files: the same settings give the same bytes (with the same Pillow)."""

    images: int
    classes: int = 8
    seed: int = 0
    height: int = 112
    width: int = 112
    val: float = 0.2  # share of the pictures that is the split val; the rest is train

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"images must be at least 2, one for train and one for val, got {self.images}")
        if not MIN_CLASSES <= self.classes <= MAX_CLASSES:
            raise ValueError(f"classes must be in {MIN_CLASSES}..{MAX_CLASSES}, got {self.classes}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if min(self.height, self.width) < MIN_SIZE or max(self.height, self.width) > 2048:
            raise ValueError(f"size must be {MIN_SIZE}..2048 pixels a side, got {self.height} x {self.width}")
        if not 0 < self.val < 1:
            raise ValueError(f"val must be a share in 0..1, both excluded, got {self.val}")

    @property
    def num_val(self) -> int:
        return min(self.images - 1, max(1, round(self.images * self.val)))


@dataclass(frozen=True)
class Thing:
    """One object of a picture."""

    class_id: int
    box: tuple[int, int, int, int]  # of what is visible: x0, y0, x1, y1, the last pixels included
    truncated: bool  # by the border
    occluded: bool


class Scenes:
    """The pictures of one set, each made from (seed, number) alone.

    An object is a body and a part on it. Bodies have one of five shapes and one of four grains, both shared by several
    classes, and any colour; the part has a pattern in two colours that only its class has. A classifier needs no more
    than the parts, so its activation maps cover mainly those; a network that is shown masks can learn the bodies.

    Example:
        >>> image, mask, things = Scenes(Settings(images=10, classes=4, seed=1))[0]
        >>> image.shape, mask.shape, {t.class_id for t in things} == set(np.unique(mask)) - {0}
        ((112, 112, 3), (112, 112), True)
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        side = 2 * max(settings.height, settings.width)
        rng = np.random.default_rng([settings.seed, 0])
        self._grounds = ground_bank(rng, side)
        self._grains = grain_bank(rng, side)
        turn = rng.random()
        self._colours = [_hue(turn + c / settings.classes) for c in range(settings.classes)]

    def __len__(self) -> int:
        return self.settings.images

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, list[Thing]]:
        """Picture [H, W, 3] uint8, mask [H, W] uint8 without ignored pixels, and what is in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture must be in 0..{len(self) - 1}, got {i}")
        rng = np.random.default_rng([self.settings.seed, 1, i])
        canvas, ground = self._ground(rng)
        owner = np.zeros(canvas.shape[:2], dtype=np.uint8)  # 0, or the number of the object
        is_part = np.zeros(canvas.shape[:2], dtype=bool)
        area: list[int] = []  # pixels of body and part before anything covers them
        part_area: list[int] = []
        class_ids: list[int] = []
        wanted = 1 + int(rng.choice(3, p=(0.45, 0.38, 0.17)))
        cut = []
        for number in range(wanted):
            # the first in turn, so that every class comes up equally often
            c = i % self.settings.classes if number == 0 else int(rng.integers(self.settings.classes))
            for _ in range(_TRIES):
                place, body, part, u, v, truncated = self._outline(rng, c)
                if part.any() and self._fits(owner[place], is_part[place], body, area, part_area):
                    break
            else:
                continue
            self._draw(rng, canvas[place], body, part, u, v, c, ground)
            owner[place][body] = len(area) + 1
            is_part[place][body] = part[body]
            area.append(int(body.sum()))
            part_area.append(int(part.sum()))
            class_ids.append(c + 1)
            cut.append(truncated)
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 7))
        image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
        mask = np.array([0, *class_ids], dtype=np.uint8)[owner]
        things = [
            Thing(class_ids[k], _box(owner == k + 1), cut[k], bool((owner == k + 1).sum() < area[k]))
            for k in range(len(area))
        ]
        return image, mask, things

    def _ground(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Canvas [H, W, 3] float32 and its mean colour; two grounds meet along a wavy line in half of the pictures."""
        canvas = self._ramp(rng)
        if rng.random() < 0.5:
            rows = np.arange(self.settings.height, dtype=np.float32)[:, None] / self.settings.height
            wave = self._window(rng, self._grounds)
            below = rows + 0.4 * (wave - np.float32(0.5)) > rng.uniform(0.35, 0.7)
            canvas[below] = self._ramp(rng)[below]
        return canvas, canvas.mean(axis=(0, 1))

    def _ramp(self, rng: np.random.Generator) -> np.ndarray:
        first = rng.uniform(40, 215, 3)
        second = np.clip(first + rng.uniform(-55, 55, 3), 20, 235)
        share = self._window(rng, self._grounds)[..., None]
        return first.astype(np.float32) + share * (second - first).astype(np.float32)

    def _window(self, rng: np.random.Generator, bank: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
        """A random window of a random texture of the bank, values 0..1."""
        height, width = shape or (self.settings.height, self.settings.width)
        texture = bank[rng.integers(len(bank))]
        y, x = rng.integers(texture.shape[0] - height + 1), rng.integers(texture.shape[1] - width + 1)
        return texture[y : y + height, x : x + width]

    def _outline(
        self, rng: np.random.Generator, c: int
    ) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
        """Window of the picture; in it body (the part included) and part, and the part's own coordinates u, v."""
        height, width = self.settings.height, self.settings.width
        radius = rng.uniform(*_RADIUS) * min(height, width)
        centre_y, centre_x = (rng.uniform(0.6 * radius, n - 0.6 * radius) for n in (height, width))
        reach = 1.5 * radius
        y0, y1 = max(0, int(centre_y - reach)), min(height, int(centre_y + reach) + 1)
        x0, x1 = max(0, int(centre_x - reach)), min(width, int(centre_x + reach) + 1)
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
        ys = (np.arange(y0, y1) + 0.5 - centre_y).astype(np.float32)[:, None]
        xs = (np.arange(x0, x1) + 0.5 - centre_x).astype(np.float32)[None]
        u, v = cos * xs + sin * ys, cos * ys - sin * xs
        stretch = np.float32(rng.uniform(1.0, 1.5))
        body = SHAPES[c % len(SHAPES)](u, v * stretch)
        u = (u - np.float32(rng.uniform(0.35, 0.62))) / np.float32(_PART)
        v = (v - np.float32(rng.uniform(-0.12, 0.12))) / np.float32(_PART)
        part = u * u + v * v < 1
        truncated = centre_y < radius or centre_x < radius or centre_y > height - radius or centre_x > width - radius
        return (slice(y0, y1), slice(x0, x1)), body | part, part, u, v, truncated

    def _fits(
        self, owner: np.ndarray, is_part: np.ndarray, body: np.ndarray, area: list[int], part_area: list[int]
    ) -> bool:
        """Whether the objects below stay visible, each with its part."""
        covered = owner[body]
        parts = covered[is_part[body]]
        for k in range(len(area)):
            if (covered == k + 1).sum() > (1 - _LEAST_VISIBLE) * area[k] * 0.8:
                return False
            if (parts == k + 1).sum() > (1 - _LEAST_VISIBLE) * part_area[k] * 0.6:
                return False
        return True

    def _draw(
        self,
        rng: np.random.Generator,
        canvas: np.ndarray,
        body: np.ndarray,
        part: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        c: int,
        ground: np.ndarray,
    ) -> None:
        colour = rng.uniform(30, 225, 3)
        for _ in range(8):
            if np.abs(colour - ground).sum() > 120:
                break
            colour = rng.uniform(30, 225, 3)
        own = rng.random() < _OWN_GRAIN
        grain = self._grains[(c // 2) % GRAINS if own else int(rng.integers(GRAINS))]
        share = self._window(rng, grain, (body.shape[0], body.shape[1]))[..., None] - np.float32(0.5)
        canvas[body] = (colour.astype(np.float32) + share * np.float32(rng.uniform(45, 80)))[body]
        first, second = self._colours[c], self._colours[c] * 0.25
        # neighbours on the circle of hues differ in pattern
        on = PATTERNS[(c + c // len(PATTERNS)) % len(PATTERNS)](u, v)[..., None]
        light = np.float32(rng.uniform(0.8, 1.1))
        canvas[part] = (np.where(on, first.astype(np.float32), second.astype(np.float32)) * light)[part]


def write_set(root: Path, settings: Settings, *, advance: Callable[[int], None] = lambda count: None) -> bool:
    """Write the set as a PASCAL VOC folder: JPEGImages (PNG, nothing lost), SegmentationClass, Annotations, ImageSets.

    `synth.json` is written last. Where it is there with the same settings nothing is done.

    Args:
        root: folder, new or empty, or with what an interrupted run of the same settings left.
        settings: of the set.
        advance: called with a count of pictures now and then.

    Returns:
        bool: whether anything was written.

    Raises:
        FileError: the folder holds something else.
        OSError: of the file layer.
    """
    record = json.dumps({"format": _FORMAT, **asdict(settings)}, sort_keys=True)
    started = root / f".{_RECORD}"
    if (root / _RECORD).exists() and (root / _RECORD).read_text() == record:
        return False
    in_use = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if in_use and not (started.is_file() and started.read_text() == record):
        raise FileError(root, "must be a new or empty folder, got one with other things in it")
    write_atomically(started, record.encode())
    names = NAMES[: settings.classes]
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    scenes = Scenes(settings)
    ids = [f"synth_{i:06d}" for i in range(settings.images)]
    for i, name in enumerate(ids):
        image, mask, things = scenes[i]
        (root / "JPEGImages" / f"{name}.png").write_bytes(_png(Image.fromarray(image)))
        label = Image.fromarray(mask).convert("P")
        label.putpalette(voc_palette().tobytes())
        (root / "SegmentationClass" / f"{name}.png").write_bytes(_png(label))
        (root / "Annotations" / f"{name}.xml").write_text("\n".join(_annotation(name, image.shape, things, names)))
        advance(1)
    train = settings.images - settings.num_val
    for split, listed in (("train", ids[:train]), ("val", ids[train:]), ("trainval", ids)):
        write_atomically(
            root / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{n}\n" for n in listed).encode()
        )
    write_atomically(root / CLASSES_FILE, "".join(f"{name}\n" for name in names).encode())
    write_atomically(root / _RECORD, record.encode())
    started.unlink()
    return True


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _annotation(name: str, shape: tuple[int, ...], things: list[Thing], names: tuple[str, ...]) -> Iterator[str]:
    yield "<annotation>"
    yield f"  <filename>{name}.png</filename>"
    yield f"  <size><width>{shape[1]}</width><height>{shape[0]}</height><depth>{shape[2]}</depth></size>"
    yield "  <segmented>1</segmented>"
    for thing in things:
        x0, y0, x1, y1 = (n + 1 for n in thing.box)  # VOC counts pixels from 1
        yield "  <object>"
        yield f"    <name>{names[thing.class_id - 1]}</name>"
        yield f"    <truncated>{thing.truncated:d}</truncated><occluded>{thing.occluded:d}</occluded>"
        yield f"    <bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        yield "  </object>"
    yield "</annotation>\n"


def _box(inside: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]), int(ys[-1])


def _hue(turn: float) -> np.ndarray:
    """A saturated colour, [3] in 0..255, at a share of the circle of hues."""
    return 255 * np.clip(np.abs((turn * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
