"""Renders a scene: enamel-like shapes on a softly lit background.

Shapes are signed distance fields, so that edges are anti-aliased at every resolution and light and
shade follow from the shape itself. A rendering depends on the scene and its layout only: nothing
else is random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from scipy.ndimage import map_coordinates

from pixart_tiny.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, SceneObject

# ----------------------------------------------------------------------------------------------
# Shapes: one signed distance field each, on a grid that is computed once
# ----------------------------------------------------------------------------------------------

FIELD_EXTENT = 1.8  # the grid spans [-extent, extent]² in units of the object's radius
FIELD_SIZE = 385


def _outline(shape: str) -> np.ndarray:
    """Vertices `(N, 2)` of the shape's outline, y down, all in [-1, 1]².

    Raises: ValueError if the shape is unknown.
    """
    if shape in ("circle", "ring"):
        angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * 0.98
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.76
    if shape == "triangle":
        angle = np.deg2rad([-90, 30, 150])
        return np.stack([np.cos(angle), np.sin(angle)], 1) * 1.0 + (0, 0.2)
    if shape == "star":
        angle = np.deg2rad(-90 + 36 * np.arange(10))
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)[:, None]
        return np.stack([np.cos(angle), np.sin(angle)], 1) * radius + (0, 0.06)
    if shape == "heart":  # the classic parametric heart curve, scaled into the unit square
        t = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, np.minimum(-y - 2.5, 12.2)], 1) / 17.6
    raise ValueError(f"shape={shape!r} is unknown: use one of {', '.join(SHAPES)}.")


ROUNDING = {"square": 0.14, "triangle": 0.12, "star": 0.09, "heart": 0.1}
RING_HOLE = 0.5


def _polygon_distance(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points `(M, 2)` to a closed polygon `(N, 2)`."""
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
def distance_field(shape: str) -> np.ndarray:
    """The shape's signed distance field, `(FIELD_SIZE, FIELD_SIZE)`, in units of its radius."""
    axis = np.linspace(-FIELD_EXTENT, FIELD_EXTENT, FIELD_SIZE)
    x, y = np.meshgrid(axis, axis)
    points = np.stack([x.ravel(), y.ravel()], 1)
    field = _polygon_distance(points, _outline(shape)).reshape(x.shape) - ROUNDING.get(shape, 0)
    if shape == "ring":
        field = np.maximum(field, RING_HOLE - np.hypot(x, y))
    return field.astype(np.float32)


@cache
def _field_gradient(shape: str) -> tuple[np.ndarray, np.ndarray]:
    step = 2 * FIELD_EXTENT / (FIELD_SIZE - 1)
    gy, gx = np.gradient(distance_field(shape), step)
    return gx, gy


def sample_field(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The field at points around its centre, in units of the object's radius; y grows downwards."""
    scale = (FIELD_SIZE - 1) / (2 * FIELD_EXTENT)
    where = [(y + FIELD_EXTENT) * scale, (x + FIELD_EXTENT) * scale]
    return map_coordinates(field, where, order=1, mode="nearest")


# ----------------------------------------------------------------------------------------------
# Layout: where objects are
# ----------------------------------------------------------------------------------------------

RASTER = 16  # pixels: centres lie where the DiT's patches meet, so it has few patterns to learn
MARGIN = 0.03  # of the short side, between objects and the image's edge
GAPS = (0.07, 0.26)  # of the short side, between the two objects of a pair


@dataclass(frozen=True)
class Placement:
    """Centre and radius of an object, in units of the image's short side."""

    x: float
    y: float
    radius: float


def place(scene: Scene, height: int, width: int, rng: np.random.Generator) -> list[Placement]:
    """Draws positions that fit the image and make the scene's relation plain to see.

    Centres are multiples of `RASTER` pixels; images too small for that get a finer raster.

    Raises: ValueError if the image is too small for the scene.
    """
    short = min(height, width)
    radii = [SIZES[o.size or str(rng.choice(list(SIZES)))] * short for o in scene.objects]
    if scene.relation is None:
        centre = [
            rng.choice(_near_middle(extent, min(0.13 * short, extent / 2 - radii[0])))
            for extent in (width, height)
        ]
        return [Placement(*(float(c) / short for c in centre), radii[0] / short)]
    direction = RELATIONS[scene.relation]
    axis = 0 if direction[0] else 1
    along, across = ((width, height), (height, width))[axis]
    reading_order = slice(None, None, -direction[axis])  # -1 if the first object comes second
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
    """Pairs of centres along an axis, in pixels: inside, well apart, near the middle."""
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
    raise ValueError(f"short side {short} px: the image is too small for a scene, use 32 or more.")


# ----------------------------------------------------------------------------------------------
# Light and paint
# ----------------------------------------------------------------------------------------------


def render_scene(scene: Scene, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Renders the scene: `(height, width, 3)` uint8 sRGB. `rng` draws positions."""
    return render_layout(scene, place(scene, height, width, rng), height, width)


def render_layout(scene: Scene, layout: list[Placement], height: int, width: int) -> np.ndarray:
    """Renders the scene with its objects placed by `layout`: `(height, width, 3)` uint8 sRGB."""
    canvas = render_background(scene.background, height, width).copy()
    for item, at in zip(scene.objects, layout, strict=True):
        _paint(canvas, item, at)
    return (canvas + 0.5).astype(np.uint8)


@lru_cache(maxsize=64)
def render_background(background: str, height: int, width: int) -> np.ndarray:
    """A softly lit background, `(height, width, 3)` float32 in 0–255, brightest upper left."""
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / width
    light = 1.03 - 0.16 * np.hypot((x - 0.42) * 0.9, y - 0.36) - 0.05 * y
    colour = np.array(BACKGROUNDS[background], np.float32)
    glow = 130 * np.clip(light - 0.9, 0, 1)  # dark backgrounds need light, not only gain
    glow = glow[..., None] * (1 - colour / 255)
    return np.clip(colour * light[..., None] + glow, 0, 255)


def _paint(canvas: np.ndarray, item: SceneObject, at: Placement) -> None:
    """Paints one object and its soft shadow into the canvas, in place."""
    height, width, _ = canvas.shape
    short = min(height, width)
    reach = 1.75 * at.radius
    x0, x1 = (int(np.clip((at.x + s * reach) * short, 0, width)) for s in (-1, 1))
    y0, y1 = (int(np.clip((at.y + s * reach) * short, 0, height)) for s in (-1, 1))
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + 0.5
    canvas[y0:y1, x0:x1] = paint_pixels(canvas[y0:y1, x0:x1], item, at, x, y, short)


def paint_pixels(
    pixels: np.ndarray, item: SceneObject, at: Placement, x: np.ndarray, y: np.ndarray, short: int
) -> np.ndarray:
    """`pixels` `(…, 3)`, in 0–255, with an object and its soft shadow over them.

    `x`, `y`: the pixels' centres; `short`: the image's short side, all in pixels.
    """
    x, y = (x / short - at.x) / at.radius, (y / short - at.y) / at.radius
    field = distance_field(item.shape)
    cast = sample_field(field, x - 0.10, y - 0.18)
    shade = np.clip((0.34 - cast) / 0.6, 0, 1)
    pixels = pixels * (1 - 0.42 * (shade * shade * (3 - 2 * shade))[..., None])

    distance = sample_field(field, x, y)
    coverage = np.clip(0.5 - distance * at.radius * short, 0, 1)[..., None]
    return pixels + coverage * (_enamel(item, x, y, distance) - pixels)


def _enamel(item: SceneObject, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The lit surface, `(H, W, 3)`: a rounded bevel along the edge and a flat, glossy top."""
    bevel = 0.3
    inward = np.clip(-distance / bevel, 0, 1)
    gx, gy = _field_gradient(item.shape)
    slope = (1 - inward) ** 1.5  # 1 at the edge (facing outwards), 0 on the flat top
    nx, ny = sample_field(gx, x, y) * slope, sample_field(gy, x, y) * slope
    facing = -(0.6 * nx + 0.8 * ny)  # light from the upper left: positive where lit
    light = 0.97 - 0.07 * y + np.where(facing > 0, 0.16, 0.34) * facing
    gloss = 62 * np.exp(-(((x + 0.3) / 0.42) ** 2) - ((y + 0.42) / 0.24) ** 2) * (inward**0.5)
    colour = np.array(COLOURS[item.colour], np.float32)
    return np.clip(colour * light[..., None] + gloss[..., None], 0, 255)
