"""The world of PixArt-tiny: a caption grammar and the renderer that paints what a caption says.

A *scene* is one or two objects on a backdrop. Captions come from the scene by a small grammar with
varied wording, and `parse_caption` reads any of them back. The renderer draws enamel-like shapes
from signed distance fields, so edges are anti-aliased at every resolution and light and shade come
from the shape itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from scipy.ndimage import map_coordinates

# ----------------------------------------------------------------------------------------------
# The vocabulary of scenes
# ----------------------------------------------------------------------------------------------

COLOURS = {  # sRGB; chosen far apart in hue so that a picture can be read back
    "red": (216, 34, 44),
    "orange": (246, 124, 18),
    "yellow": (252, 212, 30),
    "green": (48, 164, 62),
    "cyan": (24, 182, 204),
    "blue": (40, 80, 228),
    "purple": (136, 52, 200),
    "pink": (250, 122, 186),
}
BACKGROUNDS = {  # low in chroma, so that every colour above stands out on every backdrop
    "white": (244, 244, 246),
    "gray": (148, 150, 154),
    "black": (26, 26, 30),
    "cream": (240, 222, 184),
    "navy": (22, 30, 66),
    "mint": (182, 222, 200),
}
KINDS = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = {"small": 0.125, "large": 0.2}  # radius as a fraction of the picture's short side
RELATIONS = {  # where the first object is, seen from the second: (dx, dy), y grows downwards
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Never shown in training: whole (colour, kind) pairs and (kind, relation, kind) triples. One pair
# a kind; every kind and both axes occur in the triples, each of which bans its mirror image too.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "heart"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("purple", "ring"),
        ("pink", "square"),
    }
)
HELD_OUT_TRIPLES = frozenset(
    {
        ("circle", "left of", "star"),
        ("square", "left of", "heart"),
        ("triangle", "left of", "ring"),
        ("star", "left of", "square"),
        ("heart", "left of", "circle"),
        ("ring", "above", "square"),
        ("star", "above", "heart"),
        ("circle", "above", "triangle"),
        ("heart", "above", "ring"),
        ("triangle", "above", "star"),
    }
)


@dataclass(frozen=True)
class Thing:
    """One object: `size` is None where a caption leaves it open."""

    colour: str
    kind: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """One or two things on a backdrop; `relation` says where the first is, seen from the second.

    `background` is None where a caption leaves it open.
    """

    things: tuple[Thing, ...]
    background: str | None
    relation: str | None = None

    def is_held_out(self) -> bool:
        """True if training never sees this scene's pairs of (colour, kind) or its triple."""
        return self.has_held_out_pair() or self.has_held_out_triple()

    def has_held_out_pair(self) -> bool:
        return any((t.colour, t.kind) in HELD_OUT_PAIRS for t in self.things)

    def has_held_out_triple(self) -> bool:
        if self.relation is None:
            return False
        first, second = (t.kind for t in self.things)
        mirrored = (second, INVERSE[self.relation], first)
        return bool({(first, self.relation, second), mirrored} & HELD_OUT_TRIPLES)


def sample_scene(rng: np.random.Generator, num_things: int | None = None) -> Scene:
    """Draws a scene uniformly over the vocabulary; `num_things` is 1 or 2 (default: 35 % ones)."""
    if num_things is None:
        num_things = 1 if rng.random() < 0.35 else 2
    things = tuple(
        Thing(str(rng.choice(list(COLOURS))), str(rng.choice(KINDS)), str(rng.choice(list(SIZES))))
        for _ in range(num_things)
    )
    background = str(rng.choice(list(BACKGROUNDS)))
    relation = str(rng.choice(list(RELATIONS))) if num_things == 2 else None
    return Scene(things, background, relation)


def sample_training_scene(rng: np.random.Generator, num_things: int | None = None) -> Scene:
    """Like `sample_scene`, without anything that is held out."""
    while (scene := sample_scene(rng, num_things)).is_held_out():
        pass
    return scene


def change_one_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with exactly one attribute (thing, relation or backdrop) made another."""
    choices = [(n, None) for n in ("background", "relation") if getattr(scene, n) is not None]
    for i, thing in enumerate(scene.things):
        choices += [("colour", i), ("kind", i)] + [("size", i)] * (thing.size is not None)
    name, index = choices[rng.integers(len(choices))]
    values = {"background": BACKGROUNDS, "relation": RELATIONS, "colour": COLOURS}
    values |= {"kind": KINDS, "size": SIZES}

    def other(now: str) -> str:
        return str(rng.choice([v for v in values[name] if v != now]))

    if index is None:
        return replace(scene, **{name: other(getattr(scene, name))})
    things = list(scene.things)
    things[index] = replace(things[index], **{name: other(getattr(things[index], name))})
    return replace(scene, things=tuple(things))


# ----------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
KIND_WORDS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
TEMPLATES = (
    "{things} on a {background} background",
    "{things} on a {background} background",
    "{things}, {background} background",
    "{things} in front of a {background} backdrop",
    "a picture of {things} on a {background} background",
    "on a {background} background there is {things}",
    "a {background} backdrop with {things}",
)
SHORT_TEMPLATES = ("{things}", "a picture of {things}")  # these leave the backdrop open


def describe(
    scene: Scene,
    rng: np.random.Generator | None = None,
    *,
    omit_sizes: bool = False,
    omit_background: bool = False,
) -> str:
    """Says the scene in words: plain wording without `rng`, varied wording with it."""

    def pick(words: tuple[str, ...]) -> str:
        return words[0] if rng is None else words[rng.integers(len(words))]

    def phrase(thing: Thing) -> str:
        size = "" if omit_sizes or thing.size is None else pick(SIZE_WORDS[thing.size]) + " "
        noun = f"{size}{thing.colour} {pick(KIND_WORDS[thing.kind])}"
        return ("an " if noun[0] in "aeiou" else "a ") + noun

    things = phrase(scene.things[0])
    if scene.relation is not None:
        things += f" {pick(RELATION_WORDS[scene.relation])} {phrase(scene.things[1])}"
    if omit_background or scene.background is None:
        return pick(SHORT_TEMPLATES).format(things=things)
    return pick(TEMPLATES).format(things=things, background=scene.background)


def _alternatives(words: dict[str, tuple[str, ...]]) -> str:
    longest_first = sorted((w for group in words.values() for w in group), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first))


_THING = re.compile(
    rf"\b(?:({_alternatives(SIZE_WORDS)})\s+)?({'|'.join(COLOURS)})\s+"
    rf"({_alternatives(KIND_WORDS)})\b"
)
_RELATION = re.compile(rf"\b({_alternatives(RELATION_WORDS)})\b")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\s+(?:background|backdrop)\b")


def _canonical(word: str, words: dict[str, tuple[str, ...]]) -> str:
    return next(name for name, group in words.items() if word in group)


def relation_position(caption: str) -> int:
    """Index of the character where the relation's words start; the caption's length without one."""
    found = list(_THING.finditer(caption))
    relation = len(found) == 2 and _RELATION.search(caption, found[0].end(), found[1].start())
    return relation.start() if relation else len(caption)


def parse_caption(caption: str) -> Scene:
    """Reads a caption of this grammar back into its scene; what it leaves open is None.

    Raises ValueError if the caption is not one of this grammar.
    """
    text = " ".join(caption.lower().split())
    found = list(_THING.finditer(text))
    background = _BACKGROUND.search(text)
    if not 1 <= len(found) <= 2:
        raise ValueError(
            f"caption={caption!r} is not a scene caption: name one or two objects with colour and "
            "shape, for example 'a large red heart on a white background'."
        )
    things = tuple(
        Thing(colour, _canonical(kind, KIND_WORDS), size and _canonical(size, SIZE_WORDS))
        for size, colour, kind in (m.groups() for m in found)
    )
    backdrop = background and background[1]
    if len(things) == 1:
        return Scene(things, backdrop)
    relation = _RELATION.search(text, found[0].end(), found[1].start())
    if relation is None:
        raise ValueError(
            f"caption={caption!r} has two objects and no relation between them: "
            f"use one of {', '.join(RELATION_WORDS)}."
        )
    return Scene(things, backdrop, _canonical(relation[1], RELATION_WORDS))


# ----------------------------------------------------------------------------------------------
# Shapes: one signed distance field a kind, on a grid that is computed once
# ----------------------------------------------------------------------------------------------

FIELD_EXTENT = 1.8  # the grid spans [-extent, extent]² in units of the object's radius
FIELD_SIZE = 385


def _outline(kind: str) -> np.ndarray:
    """Vertices (N, 2) of the kind's outline, y down, every one inside the unit square [-1, 1]²."""
    if kind in ("circle", "ring"):
        angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * 0.98
    if kind == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.76
    if kind == "triangle":
        angle = np.deg2rad([-90, 30, 150])
        return np.stack([np.cos(angle), np.sin(angle)], 1) * 1.0 + (0, 0.2)
    if kind == "star":
        angle = np.deg2rad(-90 + 36 * np.arange(10))
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)[:, None]
        return np.stack([np.cos(angle), np.sin(angle)], 1) * radius + (0, 0.06)
    if kind == "heart":  # the classic parametric heart curve, scaled into the unit square
        t = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, np.minimum(-y - 2.5, 12.2)], 1) / 17.6
    raise ValueError(f"kind={kind!r} is unknown: use one of {', '.join(KINDS)}.")


ROUNDING = {"square": 0.14, "triangle": 0.12, "star": 0.09, "heart": 0.1}
RING_HOLE = 0.5


def _polygon_distance(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points (M, 2) to a closed polygon (N, 2)."""
    start, end = vertices, np.roll(vertices, -1, axis=0)
    distance = np.full(len(points), np.inf)
    inside = np.zeros(len(points), bool)
    for a, b in zip(start, end, strict=True):
        edge, to_point = b - a, points - a
        along = np.clip(to_point @ edge / (edge @ edge), 0, 1)
        distance = np.minimum(distance, np.linalg.norm(to_point - along[:, None] * edge, axis=1))
        if a[1] != b[1]:  # even-odd rule: count crossings of a ray to the right
            crosses = (points[:, 1] < a[1]) != (points[:, 1] < b[1])
            x_at = a[0] + (points[:, 1] - a[1]) / (b[1] - a[1]) * edge[0]
            inside ^= crosses & (points[:, 0] < x_at)
    return np.where(inside, -distance, distance)


@cache
def distance_field(kind: str) -> np.ndarray:
    """The kind's signed distance field, (FIELD_SIZE, FIELD_SIZE), in units of its radius."""
    axis = np.linspace(-FIELD_EXTENT, FIELD_EXTENT, FIELD_SIZE)
    x, y = np.meshgrid(axis, axis)
    points = np.stack([x.ravel(), y.ravel()], 1)
    field = _polygon_distance(points, _outline(kind)).reshape(x.shape) - ROUNDING.get(kind, 0)
    if kind == "ring":
        field = np.maximum(field, RING_HOLE - np.hypot(x, y))
    return field.astype(np.float32)


@cache
def _field_gradient(kind: str) -> tuple[np.ndarray, np.ndarray]:
    step = 2 * FIELD_EXTENT / (FIELD_SIZE - 1)
    gy, gx = np.gradient(distance_field(kind), step)
    return gx, gy


def _sample(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = (FIELD_SIZE - 1) / (2 * FIELD_EXTENT)
    where = [(y + FIELD_EXTENT) * scale, (x + FIELD_EXTENT) * scale]
    return map_coordinates(field, where, order=1, mode="nearest")


# ----------------------------------------------------------------------------------------------
# Layout and rendering
# ----------------------------------------------------------------------------------------------


RASTER = 16  # pixels: things stand where the DiT's patches meet, so it has few patterns to learn
MARGIN = 0.03  # of the short side, between things and the picture's edge
GAPS = (0.07, 0.26)  # of the short side, between the two things of a pair


@dataclass(frozen=True)
class Placement:
    """Centre and radius of a thing, in units of the picture's short side."""

    x: float
    y: float
    radius: float


def place(scene: Scene, height: int, width: int, rng: np.random.Generator) -> list[Placement]:
    """Draws positions that fit the picture and make the scene's relation plain to see.

    Centres are multiples of `RASTER` pixels; pictures too small for that get a finer raster.
    """
    short = min(height, width)
    radii = [SIZES[t.size or str(rng.choice(list(SIZES)))] * short for t in scene.things]
    if scene.relation is None:
        centre = [
            rng.choice(_near_middle(extent, min(0.13 * short, extent / 2 - radii[0])))
            for extent in (width, height)
        ]
        return [Placement(*(float(c) / short for c in centre), radii[0] / short)]
    direction = RELATIONS[scene.relation]
    axis = 0 if direction[0] else 1
    along, across = ((width, height), (height, width))[axis]
    reading_order = slice(None, None, -direction[axis])  # -1 if the first thing comes second
    pairs = _pairs(along, *radii[reading_order], short)
    starts = pairs[rng.integers(len(pairs))][reading_order]
    placed = []
    for start, radius in zip(starts, radii, strict=True):
        other = rng.choice(_near_middle(across, min(RASTER, 0.13 * short)))
        centre = (start, other) if axis == 0 else (other, start)
        placed.append(Placement(*(float(c) / short for c in centre), radius / short))
    return placed


def _near_middle(extent: int, reach: float) -> np.ndarray:
    """Multiples of `RASTER` at most `reach` pixels from the middle, or the middle itself."""
    points = np.arange(0, extent + 1, RASTER)
    points = points[np.abs(points - extent / 2) <= reach]
    return points if len(points) else np.array([extent / 2])


@lru_cache(maxsize=256)
def _pairs(extent: int, first: float, second: float, short: int) -> list[tuple[float, float]]:
    """Where two radii can stand along an axis, in pixels: inside, well apart, near the middle."""
    margin, gaps = MARGIN * short, np.array(GAPS) * short
    for raster in (RASTER, RASTER / 2, RASTER / 4, 1, 0.25):
        points = np.arange(0, extent + raster, raster)
        a, b = (grid.ravel() for grid in np.meshgrid(points, points))
        gap = b - a - first - second
        fits = (a - first >= margin) & (b + second <= extent - margin)
        fits &= (gap >= gaps[0]) & (gap <= gaps[1])
        off_middle = np.abs((a - first + b + second - extent) / 2)
        fits &= off_middle <= 0.1 * short
        if fits.any():
            return list(zip(a[fits].tolist(), b[fits].tolist(), strict=True))
    raise ValueError(f"short side {short} px: too small a picture for a scene, use 32 or more.")


@lru_cache(maxsize=64)
def _backdrop(background: str, height: int, width: int) -> np.ndarray:
    """A softly lit studio backdrop, (height, width, 3) float32 in 0–255, brightest upper left."""
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / width
    light = 1.03 - 0.16 * np.hypot((x - 0.42) * 0.9, y - 0.36) - 0.05 * y
    colour = np.array(BACKGROUNDS[background], np.float32)
    glow = 130 * np.clip(light - 0.9, 0, 1)  # dark backdrops need light, not only gain
    glow = glow[..., None] * (1 - colour / 255)
    return np.clip(colour * light[..., None] + glow, 0, 255)


def _paint(canvas: np.ndarray, thing: Thing, at: Placement) -> None:
    """Paints one thing and its soft shadow into the canvas, in place."""
    height, width, _ = canvas.shape
    short = min(height, width)
    reach = 1.75 * at.radius
    x0, x1 = (int(np.clip((at.x + s * reach) * short, 0, width)) for s in (-1, 1))
    y0, y1 = (int(np.clip((at.y + s * reach) * short, 0, height)) for s in (-1, 1))
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + 0.5
    x, y = (x / short - at.x) / at.radius, (y / short - at.y) / at.radius
    patch = canvas[y0:y1, x0:x1]

    field = distance_field(thing.kind)
    cast = _sample(field, x - 0.10, y - 0.18)
    shade = np.clip((0.34 - cast) / 0.6, 0, 1)
    patch *= 1 - 0.42 * (shade * shade * (3 - 2 * shade))[..., None]

    distance = _sample(field, x, y)
    coverage = np.clip(0.5 - distance * at.radius * short, 0, 1)[..., None]
    patch += coverage * (_enamel(thing, x, y, distance) - patch)


def _enamel(thing: Thing, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The lit surface, (H, W, 3): a rounded bevel along the edge and a flat, glossy top."""
    bevel = 0.3
    inward = np.clip(-distance / bevel, 0, 1)
    gx, gy = _field_gradient(thing.kind)
    slope = (1 - inward) ** 1.5  # 1 at the edge (facing outwards), 0 on the flat top
    nx, ny = _sample(gx, x, y) * slope, _sample(gy, x, y) * slope
    facing = -(0.6 * nx + 0.8 * ny)  # light from the upper left: positive where lit
    light = 0.97 - 0.07 * y + np.where(facing > 0, 0.16, 0.34) * facing
    gloss = 62 * np.exp(-(((x + 0.3) / 0.42) ** 2) - ((y + 0.42) / 0.24) ** 2) * (inward**0.5)
    colour = np.array(COLOURS[thing.colour], np.float32)
    return np.clip(colour * light[..., None] + gloss[..., None], 0, 255)


def paint(scene: Scene, layout: list[Placement], height: int, width: int) -> np.ndarray:
    """Paints the scene with its things placed as `layout` says: (height, width, 3) uint8 sRGB."""
    canvas = _backdrop(scene.background, height, width).copy()
    for thing, at in zip(scene.things, layout, strict=True):
        _paint(canvas, thing, at)
    return (canvas + 0.5).astype(np.uint8)


def render(scene: Scene, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Paints the scene: (height, width, 3) uint8 sRGB. `rng` draws positions."""
    return paint(scene, place(scene, height, width, rng), height, width)
