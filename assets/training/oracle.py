"""Reads a picture of PixArt-tiny's world back into attributes – image processing, no learning.

An object is what differs in hue from a smooth backdrop; its kind is the outline that overlaps it
best; colour and backdrop are the nearest of the palette. `score_caption` compares the reading with
a caption, attribute by attribute. A picture is *right* when every attribute is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab

from assets.training import scenes

FAINT = 17.0  # distance in hue (ab) from the backdrop at which something is there at all
VIVID = 26.0  # … and which an object reaches: no colour of the palette comes closer than 30
MIN_OBJECT_AREA = 0.004  # of the short side squared; smaller specks are ignored
MIN_OVERLAP = 0.84  # intersection over union with the best outline; torn shapes stay below
SIZE_LIMIT = float(np.sqrt(scenes.SIZES["small"] * scenes.SIZES["large"]))


@dataclass(frozen=True)
class ReadThing:
    """One object as read: attributes, centre (x, y) and radius in units of the short side."""

    colour: str
    kind: str
    size: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """Everything read from one picture; `things` go from the largest to the smallest.

    `blemishes` counts what is there and is no object: ghosts and blotches, too faint for a colour.
    """

    things: tuple[ReadThing, ...]
    background: str
    blemishes: int = 0

    def __str__(self) -> str:
        """Attributes in words, objects from left to right, as in "small red ring on white"."""
        ordered = sorted(self.things, key=lambda thing: (round(thing.x, 1), thing.y))
        named = " and ".join(f"{t.size} {t.colour} {t.kind}" for t in ordered) or "nothing"
        return f"{named} on {self.background}"


@dataclass(frozen=True)
class Score:
    """Attribute → right or wrong, for one picture against one caption."""

    attributes: dict[str, bool]

    @property
    def right(self) -> bool:
        return all(self.attributes.values())


# ----------------------------------------------------------------------------------------------
# References, rendered once
# ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _background_references() -> dict[str, np.ndarray]:
    return {
        name: np.median(rgb2lab(scenes._backdrop(name, 64, 64) / 255).reshape(-1, 3), axis=0)
        for name in scenes.BACKGROUNDS
    }


@lru_cache(maxsize=1)
def _colour_references() -> dict[str, np.ndarray]:
    def inside(colour: str) -> np.ndarray:
        scene = scenes.Scene((scenes.Thing(colour, "square", "large"),), "gray")
        picture = rgb2lab(scenes.render(scene, 128, 128, np.random.default_rng(0)))
        return np.median(picture[_distance_from_backdrop(picture) > FAINT], axis=0)

    return {colour: inside(colour) for colour in scenes.COLOURS}


@cache
def _outline_facts(kind: str) -> tuple[float, float, float]:
    """(area, centroid x, centroid y) of the kind's outline, in units of its radius."""
    inside = scenes.distance_field(kind) < 0
    step = 2 * scenes.FIELD_EXTENT / (scenes.FIELD_SIZE - 1)
    y, x = np.nonzero(inside)
    return inside.sum() * step**2, *(float(v.mean() * step - scenes.FIELD_EXTENT) for v in (x, y))


# ----------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------


def _border(lab: np.ndarray) -> np.ndarray:
    """The outermost 3 % of the picture: backdrop, whatever the scene."""
    band = max(2, round(0.03 * min(lab.shape[:2])))
    sides = [lab[:band], lab[-band:], lab[:, :band], lab[:, -band:]]
    return np.concatenate([side.reshape(-1, 3) for side in sides])


def _distance_from_backdrop(lab: np.ndarray) -> np.ndarray:
    """How far each pixel's hue is from the backdrop's; shadows change only its lightness."""
    backdrop = np.median(_border(lab), axis=0)
    # Shade scales a colour's chroma with its lightness: compare with the backdrop's shaded hue.
    shade = np.clip(lab[..., 0] / max(backdrop[0], 1), 0, 1.1)[..., None]
    distance = np.linalg.norm(lab[..., 1:] - backdrop[1:] * shade, axis=-1)
    return ndimage.median_filter(distance.astype(np.float32), size=3)


def _outline_mask(distance: np.ndarray, component: np.ndarray) -> np.ndarray:
    """The component up to where its hue is half gone: the edge, however soft; gloss filled in."""
    mask = component & (distance > 0.5 * np.percentile(distance[component], 90))
    holes, _ = ndimage.label(~mask)
    sizes = np.bincount(holes.ravel())
    return mask | (sizes < 0.04 * mask.sum())[holes]


def _classify_outline(mask: np.ndarray) -> tuple[str, float, float]:
    """(kind, radius in pixels, overlap) of the outline that fits a component's mask best."""
    y, x = np.nonzero(mask)
    best = ("", 0.0, 0.0)
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    for kind in scenes.KINDS:
        area, cx, cy = _outline_facts(kind)
        radius = float(np.sqrt(len(x) / area))
        u, v = (columns - x.mean()) / radius + cx, (rows - y.mean()) / radius + cy
        template = scenes._sample(scenes.distance_field(kind), u, v) < 0
        overlap = float((template & mask).sum() / (template | mask).sum())
        if overlap > best[2]:
            best = (kind, radius, overlap)
    return best


def _nearest(colour: np.ndarray, references: dict[str, np.ndarray], weights: tuple) -> str:
    def distance(name: str) -> float:
        return float(np.linalg.norm((colour - references[name]) * weights))

    return min(references, key=distance)


def read_picture(picture: Image.Image | np.ndarray) -> Reading:
    """Reads a picture, RGB uint8 of any size, into its objects and backdrop."""
    lab = rgb2lab(np.asarray(picture)[..., :3])
    short = min(lab.shape[:2])
    distance = _distance_from_backdrop(lab)
    labels, _ = ndimage.label(distance > FAINT)
    things, blemishes = [], 0
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[window] == index
        if component.sum() < MIN_OBJECT_AREA * short**2:
            continue
        if np.percentile(distance[window][component], 90) < VIVID:
            blemishes += 1
            continue
        mask = np.pad(_outline_mask(distance[window], component), 2)
        kind, radius, overlap = _classify_outline(mask)
        core = ndimage.binary_erosion(mask, iterations=max(1, short // 64))
        core = (core if core.any() else mask)[2:-2, 2:-2]
        y, x = np.nonzero(mask)
        top, left = window[0].start - 2, window[1].start - 2
        things.append(
            ReadThing(
                colour=_nearest(
                    np.median(lab[window][core], axis=0), _colour_references(), (0.5, 1, 1)
                ),
                kind=kind,
                size="small" if radius / short < SIZE_LIMIT else "large",
                x=float((x.mean() + left) / short),
                y=float((y.mean() + top) / short),
                radius=radius / short,
                overlap=overlap,
            )
        )
    background = _nearest(np.median(_border(lab), axis=0), _background_references(), (1, 1, 1))
    return Reading(tuple(sorted(things, key=lambda t: -t.radius)), background, blemishes)


def _relation(first: ReadThing, second: ReadThing) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# ----------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------


def _match(scene: scenes.Scene, read: Sequence[ReadThing]) -> dict[str, bool]:
    attributes = {}
    for name in ("colour", "kind", "size"):
        attributes[name] = all(
            getattr(asked, name) in (None, getattr(got, name))
            for asked, got in zip(scene.things, read, strict=True)
        )
    attributes["clean"] = all(got.overlap >= MIN_OVERLAP for got in read)
    if scene.relation is not None:
        attributes["relation"] = _relation(*read) == scene.relation
    return attributes


def score_caption(picture: Image.Image | np.ndarray, caption: str | scenes.Scene) -> Score:
    """Compares a picture with a caption of the grammar (or with a scene).

    Attributes: `count` (as many objects as asked for), `colour`, `kind`, `size` (each for all
    objects at once), `clean` (outlines whole, no ghosts), `relation` (two objects only) and
    `background`; what the caption leaves open is not asked. Two objects are matched with the
    caption's in the order that gets most attributes right. With a wrong count, every attribute of
    objects counts as wrong.
    """
    scene = scenes.parse_caption(caption) if isinstance(caption, str) else caption
    return score_reading(read_picture(picture), scene)


def score_reading(reading: Reading, scene: scenes.Scene) -> Score:
    """Compares what was read from a picture with a scene; see `score_caption`."""
    things = reading.things
    counted = len(things) == len(scene.things)
    if not counted:
        names = ["colour", "kind", "size", "clean"] + ["relation"] * (len(scene.things) == 2)
        attributes = dict.fromkeys(names, False)
    else:
        orders = [_match(scene, order) for order in {things, things[::-1]}]
        attributes = max(orders, key=lambda found: sum(found.values()))
        attributes["clean"] &= reading.blemishes == 0
    attributes["count"] = counted
    if scene.background is not None:
        attributes["background"] = reading.background == scene.background
    return Score(attributes)


def score_pictures(pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    """1.0 for every picture that is right in every attribute, else 0.0; a scorer."""
    return [float(score_caption(p, c).right) for p, c in zip(pictures, captions, strict=True)]
