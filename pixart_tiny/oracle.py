"""Reads an image of PixArt-tiny's world back into attributes: image processing, no learning.

An object is a region whose hue differs from the smooth background; its shape is the outline that
overlaps it best; colour and background are the nearest of the palette. `score_caption` compares the
reading with a caption, attribute by attribute. An image is *right* when every attribute is.

`cleanness` is continuous: how near an image is to the rendering of what was read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from pixart_tiny import render, scenes

FAINT = 17.0  # distance in hue (ab) from the background at which a region is seen at all
VIVID = 26.0  # … which an object reaches: every colour of the palette is 30 away or more
MIN_OBJECT_AREA = 0.004  # of the short side squared; smaller regions are ignored
MIN_OVERLAP = 0.84  # intersection over union with the best outline; torn shapes have less
SIZE_LIMIT = float(np.sqrt(scenes.SIZES["small"] * scenes.SIZES["large"]))


@dataclass(frozen=True)
class ReadObject:
    """One object as read: attributes, centre (x, y) and radius in units of the short side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """All that is read from one image; `objects` go from the largest to the smallest.

    `blemishes`: the number of ghosts and blotches, regions too faint for an object.
    """

    objects: tuple[ReadObject, ...]
    background: str
    blemishes: int = 0

    def __str__(self) -> str:
        """Attributes in words, objects from left to right, as in "small red ring on white"."""
        ordered = sorted(self.objects, key=lambda o: (round(o.x, 1), o.y))
        named = " and ".join(f"{o.size} {o.colour} {o.shape}" for o in ordered) or "nothing"
        return f"{named} on {self.background}"


@dataclass(frozen=True)
class Score:
    """Attribute → right or wrong, for one image and one caption."""

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
        name: np.median(
            rgb2lab(render.render_background(name, 64, 64) / 255).reshape(-1, 3), axis=0
        )
        for name in scenes.BACKGROUNDS
    }


@lru_cache(maxsize=1)
def _colour_references() -> dict[str, np.ndarray]:
    def inside(colour: str) -> np.ndarray:
        scene = scenes.Scene((scenes.SceneObject(colour, "square", "large"),), "gray")
        lab = rgb2lab(render.render_scene(scene, 128, 128, np.random.default_rng(0)))
        return np.median(lab[_distance_from_background(lab) > FAINT], axis=0)

    return {colour: inside(colour) for colour in scenes.COLOURS}


@cache
def _outline_facts(shape: str) -> tuple[float, float, float]:
    """(area, centroid x, centroid y) of the shape's outline, in units of its radius."""
    inside = render.distance_field(shape) < 0
    step = 2 * render.FIELD_EXTENT / (render.FIELD_SIZE - 1)
    y, x = np.nonzero(inside)
    return inside.sum() * step**2, *(float(v.mean() * step - render.FIELD_EXTENT) for v in (x, y))


# ----------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------


def _border(lab: np.ndarray) -> np.ndarray:
    """The outermost 3 % of the image, which are background in every scene."""
    band = max(2, round(0.03 * min(lab.shape[:2])))
    sides = [lab[:band], lab[-band:], lab[:, :band], lab[:, -band:]]
    return np.concatenate([side.reshape(-1, 3) for side in sides])


def _distance_from_background(lab: np.ndarray) -> np.ndarray:
    """How far each pixel's hue is from the background's; shadows change only its lightness."""
    background = np.median(_border(lab), axis=0)
    # Shade scales a colour's chroma with its lightness: compare with the shaded background.
    shade = np.clip(lab[..., 0] / max(background[0], 1), 0, 1.1)[..., None]
    distance = np.linalg.norm(lab[..., 1:] - background[1:] * shade, axis=-1)
    return ndimage.median_filter(distance.astype(np.float32), size=3)


def _outline_mask(distance: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The region up to its edge, where half of its hue is left; holes made by gloss are filled."""
    mask = region & (distance > 0.5 * np.percentile(distance[region], 90))
    holes, _ = ndimage.label(~mask)
    sizes = np.bincount(holes.ravel())
    return mask | (sizes < 0.04 * mask.sum())[holes]


def _classify_outline(mask: np.ndarray) -> tuple[str, float, float]:
    """(shape, radius in pixels, overlap) of the outline that fits a region's mask best."""
    y, x = np.nonzero(mask)
    best = ("", 0.0, 0.0)
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    for shape in scenes.SHAPES:
        area, cx, cy = _outline_facts(shape)
        radius = float(np.sqrt(len(x) / area))
        u, v = (columns - x.mean()) / radius + cx, (rows - y.mean()) / radius + cy
        template = render.sample_field(render.distance_field(shape), u, v) < 0
        overlap = float((template & mask).sum() / (template | mask).sum())
        if overlap > best[2]:
            best = (shape, radius, overlap)
    return best


def _nearest(colour: np.ndarray, references: dict[str, np.ndarray], weights: tuple) -> str:
    def distance(name: str) -> float:
        return float(np.linalg.norm((colour - references[name]) * weights))

    return min(references, key=distance)


def read_picture(image: Image.Image | np.ndarray) -> Reading:
    """Reads an image, RGB uint8 of any size, into its objects and background."""
    lab = rgb2lab(np.asarray(image)[..., :3])
    short = min(lab.shape[:2])
    distance = _distance_from_background(lab)
    labels, _ = ndimage.label(distance > FAINT)
    objects, blemishes = [], 0
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[window] == index
        if region.sum() < MIN_OBJECT_AREA * short**2:
            continue
        if np.percentile(distance[window][region], 90) < VIVID:
            blemishes += 1
            continue
        mask = np.pad(_outline_mask(distance[window], region), 2)
        shape, radius, overlap = _classify_outline(mask)
        core = ndimage.binary_erosion(mask, iterations=max(1, short // 64))
        core = (core if core.any() else mask)[2:-2, 2:-2]
        y, x = np.nonzero(mask)
        top, left = window[0].start - 2, window[1].start - 2
        objects.append(
            ReadObject(
                colour=_nearest(
                    np.median(lab[window][core], axis=0), _colour_references(), (0.5, 1, 1)
                ),
                shape=shape,
                size="small" if radius / short < SIZE_LIMIT else "large",
                x=float((x.mean() + left) / short),
                y=float((y.mean() + top) / short),
                radius=radius / short,
                overlap=overlap,
            )
        )
    background = _nearest(np.median(_border(lab), axis=0), _background_references(), (1, 1, 1))
    return Reading(tuple(sorted(objects, key=lambda o: -o.radius)), background, blemishes)


def _relation(first: ReadObject, second: ReadObject) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# ----------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------


def _match(scene: scenes.Scene, read: Sequence[ReadObject]) -> dict[str, bool]:
    attributes = {}
    for name in ("colour", "shape", "size"):
        attributes[name] = all(
            getattr(asked, name) in (None, getattr(got, name))
            for asked, got in zip(scene.objects, read, strict=True)
        )
    attributes["clean"] = all(got.overlap >= MIN_OVERLAP for got in read)
    if scene.relation is not None:
        attributes["relation"] = _relation(*read) == scene.relation
    return attributes


def score_caption(image: Image.Image | np.ndarray, caption: str | scenes.Scene) -> Score:
    """Compares an image with a caption of the grammar (or with a scene).

    Attributes: `count` (as many objects as asked for), `colour`, `shape`, `size` (each for all
    objects at once), `clean` (outlines whole, no ghosts), `relation` (two objects only) and
    `background`; attributes that the caption leaves open are not compared. Two objects are matched
    with the caption's in the order that makes most attributes right. With a wrong count, every
    attribute of objects counts as wrong.

    Raises: ValueError if the caption does not follow the grammar.
    """
    scene = scenes.parse_caption(caption) if isinstance(caption, str) else caption
    return score_reading(read_picture(image), scene)


def score_reading(reading: Reading, scene: scenes.Scene) -> Score:
    """Compares a reading with a scene; see `score_caption`."""
    objects = reading.objects
    counted = len(objects) == len(scene.objects)
    if not counted:
        names = ["colour", "shape", "size", "clean"] + ["relation"] * (len(scene.objects) == 2)
        attributes = dict.fromkeys(names, False)
    else:
        orders = [_match(scene, order) for order in {objects, objects[::-1]}]
        attributes = max(orders, key=lambda found: sum(found.values()))
        attributes["clean"] &= reading.blemishes == 0
    attributes["count"] = counted
    if scene.background is not None:
        attributes["background"] = reading.background == scene.background
    return Score(attributes)


def score_pictures(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    """1.0 for each image that is right in every attribute, else 0.0; a scorer."""
    return [float(score_caption(p, c).right) for p, c in zip(images, captions, strict=True)]


# ----------------------------------------------------------------------------------------------
# Cleanness: how near an image is to the rendering of what it shows
# ----------------------------------------------------------------------------------------------

EDGE = 3.0  # pixels to both sides of an outline that decide where the object is
FIT_STEPS = (1.0, 1.0, 0.5, 0.25, 0.25)  # pixels; wide at first: an edge itself is one pixel wide
CLEANEST = 99.0  # dB: what equal images get in place of infinity


def cleanness(image: Image.Image | np.ndarray, reading: Reading | None = None) -> float:
    """PSNR in dB between an image and the rendering of what was read from it, at most 99.

    Blotches, soft or ragged outlines and dents lower it; where objects are and how large does not.
    `reading`: of this image, if there is one already.
    """
    pixels = np.asarray(image)[..., :3]
    with np.errstate(divide="ignore"):
        found = max(peak_signal_noise_ratio(pixels, r) for r in _redraw(pixels, reading))
    return min(float(found), CLEANEST)


def _redraw(image: np.ndarray, reading: Reading | None) -> list[np.ndarray]:
    """Renderings of what was read, one per order of two objects: shadows fall on what is below."""
    reading = reading or read_picture(image)
    drawn = [
        (scenes.SceneObject(o.colour, o.shape, o.size), locate(image, o, reading.background))
        for o in reading.objects
        if o.shape  # without a readable outline there is nothing to draw: it counts as a blotch
    ]
    images = []
    for ordered in (drawn, drawn[::-1])[: max(1, len(drawn))]:
        scene = scenes.Scene(tuple(item for item, _ in ordered), reading.background)
        images.append(render.render_layout(scene, [at for _, at in ordered], *image.shape[:2]))
    return images


def locate(image: np.ndarray, found: ReadObject, background: str) -> render.Placement:
    """An object's centre and radius to a fraction of a pixel.

    Least squares (Gauss–Newton) between the image and the rendering, on pixels near the outline.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    _, cx, cy = _outline_facts(found.shape)
    start = [found.x - cx * found.radius, found.y - cy * found.radius, found.radius]
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    u, v = (columns / short - start[0]) / start[2], (rows / short - start[1]) / start[2]
    distance = render.sample_field(render.distance_field(found.shape), u, v)
    near = np.abs(distance) * start[2] * short < EDGE
    x, y, target = columns[near], rows[near], image[near].astype(np.float32)
    canvas = render.render_background(background, height, width)[near]
    item = scenes.SceneObject(found.colour, found.shape, found.size)

    def rendered(at: np.ndarray) -> np.ndarray:
        return render.paint_pixels(canvas, item, render.Placement(*at), x, y, short).ravel()

    at = np.array(start)
    for step in FIT_STEPS:
        offsets = np.eye(3) * step / short
        slopes = [(rendered(at + o) - rendered(at - o)) * short / (2 * step) for o in offsets]
        move = np.linalg.lstsq(np.stack(slopes, 1), target.ravel() - rendered(at))[0]
        at = at + np.clip(move, -1 / short, 1 / short)
    return render.Placement(*map(float, at))
