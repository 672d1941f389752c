"""Photographs of the demo, where they come from, and the strokes drawn on them by hand."""

from __future__ import annotations

from dataclasses import dataclass

Stroke = tuple[tuple[int, int], ...]  # (x, y) pixels of the photograph, joined by lines


@dataclass(frozen=True)
class Scene:
    """One photograph and one object in it."""

    photograph: str  # function of skimage.data
    thing: str  # what the strokes are on
    strokes: tuple[Stroke, ...]
    note: str


# The licences are those scikit-image states for the files it bundles.
CREDITS = {
    "astronaut": "Eileen Collins; NASA Great Images, public domain",
    "rocket": "Falcon 9 with DSCOVR; SpaceX, public domain",
    "camera": "cameraman; Lav Varshney, CC0",
    "coffee": "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0",
    "chelsea": "Chelsea the cat; Stefan van der Walt, CC0",
}

SCENES = (
    Scene(
        "astronaut",
        "astronaut",
        (
            ((195, 60), (240, 45), (285, 85)),
            ((215, 110), (240, 130)),
            ((225, 205), (245, 225)),
            ((128, 200), (160, 255)),
            ((240, 287), (285, 260)),
            ((90, 300), (150, 330)),
            ((300, 310), (320, 330)),
            ((150, 380), (190, 390)),
            ((80, 440), (150, 440)),
            ((330, 430), (400, 420)),
            ((380, 350), (440, 375)),
        ),
        "Eleven strokes: hair, face, collar, suit, badge, helmet.",
    ),
    Scene(
        "rocket",
        "rocket",
        (((322, 150), (322, 152)), ((322, 200), (322, 204)), ((322, 270), (322, 274)), ((322, 340), (322, 344))),
        "Four dots on an object 22 pixels wide.",
    ),
    Scene(
        "camera",
        "cameraman",
        (
            ((190, 90), (240, 110)),
            ((230, 165), (215, 150)),
            ((100, 180), (120, 300)),
            ((60, 400), (60, 440)),
            ((200, 220), (215, 215)),
            ((230, 265), (250, 280)),
        ),
        "No colour at all: the walk has lightness only.",
    ),
    Scene(
        "coffee",
        "cup, saucer and spoon",
        (
            ((260, 60), (330, 70)),
            ((180, 100), (190, 130)),
            ((382, 60), (397, 95)),
            ((270, 150), (330, 150)),
            ((120, 160), (120, 220)),
            ((430, 200), (430, 250)),
            ((230, 220), (300, 240)),
            ((215, 260), (225, 250)),
            ((300, 340), (360, 340)),
            ((340, 290), (380, 270)),
        ),
        "A red saucer on a red-brown table.",
    ),
    Scene(
        "chelsea",
        "cat",
        (
            ((80, 60), (130, 60)),
            ((220, 30), (260, 30)),
            ((165, 115), (180, 115)),
            ((315, 130), (320, 130)),
            ((250, 100), (260, 160)),
            ((335, 160), (330, 180)),
            ((100, 180), (160, 180)),
            ((230, 230), (280, 250)),
            ((60, 230), (70, 270)),
            ((355, 40), (350, 55)),
        ),
        "Stripes, eyes and a white chest before a pale blanket.",
    ),
    Scene(
        "astronaut",
        "shuttle model",
        (
            ((395, 130), (393, 180)),
            ((418, 60), (420, 110)),
            ((443, 80), (443, 150)),
            ((375, 215), (385, 225)),
            ((440, 215), (430, 220)),
        ),
        "A failure: the white model has the colours of the wall, and the walk on colours runs out into it. Such objects"
        " need the features of a network: refine_cams(cams, feats, guide=picture), or wsss refine --feats DIR.",
    ),
)
