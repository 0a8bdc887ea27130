"""The oracle's readings and its measure of cleanness."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from ov_pixart_helper import image_sizes
from pixart_tiny import evaluate, oracle, render, scenes

SIZES = [size for name, size in image_sizes(evaluate.CHECKPOINT).items() if name in ("1:1", "9:16")]

# ----------------------------------------------------------------------------------------------
# Damage to renderings: each function makes it worse as `amount` grows
# ----------------------------------------------------------------------------------------------


def smooth_noise(shape: tuple[int, ...], scale: float, seed: int) -> np.ndarray:
    """Noise of unit variance whose blotches are about `scale` pixels wide."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = ndimage.gaussian_filter(noise, (scale, scale) + (0,) * (len(shape) - 2))
    return noise / noise.std()


def blur(image: np.ndarray, amount: float) -> np.ndarray:
    """Gaussian blur, `amount` in pixels."""
    return ndimage.gaussian_filter(image, (amount, amount, 0))


def blotch(image: np.ndarray, amount: float) -> np.ndarray:
    """Patches of other colours all over, `amount` in grey levels."""
    return image + amount * smooth_noise(image.shape, 9, seed=1)


def ragged(image: np.ndarray, amount: float) -> np.ndarray:
    """Outlines that waver by `amount` pixels."""
    return bend(image, amount, scale=3)


def dent(image: np.ndarray, amount: float) -> np.ndarray:
    """Outlines pushed in and out over long stretches, `amount` in pixels."""
    return bend(image, amount, scale=12)


def bend(image: np.ndarray, amount: float, scale: float) -> np.ndarray:
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]].astype(float)
    rows += amount * smooth_noise(rows.shape, scale, seed=2)
    columns += amount * smooth_noise(rows.shape, scale, seed=3)
    channels = [
        ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode="nearest")
        for c in range(3)
    ]
    return np.stack(channels, -1)


GRADES = {  # damage → amounts that a person hardly notices, notices at once, finds ugly
    blur: (0.4, 1.0, 2.0),
    blotch: (1.5, 5.0, 10.0),
    ragged: (0.25, 0.8, 1.8),
    dent: (0.3, 1.2, 3.5),
}


def damaged(image: np.ndarray, damage: Callable, amount: float) -> np.ndarray:
    return np.clip(damage(image.astype(float), amount), 0, 255).round().astype(np.uint8)


def some_renderings(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    drawn = [scenes.sample_scene(rng, num_objects=1 + i % 2) for i in range(count)]
    return [render.render_scene(s, *SIZES[i % len(SIZES)], rng) for i, s in enumerate(drawn)]


# ----------------------------------------------------------------------------------------------
# Cleanness
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", GRADES)
def test_more_damage_means_less_cleanness(damage):
    for image in some_renderings(4):
        grades = [oracle.cleanness(damaged(image, damage, amount)) for amount in GRADES[damage]]
        ladder = [oracle.cleanness(image), *grades]
        assert all(better > worse + 2 for better, worse in pairwise(ladder))


@pytest.mark.slow
def test_damage_of_different_kinds_ranks_as_a_person_ranks_it():
    """Clean, hardly damaged, slightly blurred, blotchy, ugly: medians over renderings."""
    images = some_renderings(6)

    def median(damage: Callable, amount: float) -> float:
        return float(np.median([oracle.cleanness(damaged(i, damage, amount)) for i in images]))

    clean = float(np.median([oracle.cleanness(image) for image in images]))
    found = {damage: [median(damage, a) for a in amounts] for damage, amounts in GRADES.items()}
    hardly, at_once, ugly = zip(*found.values(), strict=True)
    blurred, blotchy, ragged_, dented = at_once
    assert clean > max(hardly) + 10
    assert min(hardly) > blurred > max(blotchy, ragged_, dented) + 3
    assert min(at_once) > max(ugly[1:])  # a blurred image is a pleasant one


def test_place_and_size_of_a_clean_object_do_not_matter():
    rng = np.random.default_rng(9)
    for i in range(6):
        scene = scenes.sample_scene(rng)
        height, width = SIZES[i % len(SIZES)]
        layout = [
            render.Placement(at.x + dx, at.y + dy, at.radius * scale)
            for at in render.place(scene, height, width, rng)
            for dx, dy, scale in [(*rng.uniform(-0.01, 0.01, 2), rng.uniform(0.95, 1.05))]
        ]
        assert oracle.cleanness(render.render_layout(scene, layout, height, width)) > 45


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_objects_are_located_to_a_twentieth_of_a_pixel(shape):
    item = scenes.SceneObject("purple", shape, "small")
    at = render.Placement(0.4513, 0.5278, 0.131)
    image = render.render_layout(scenes.Scene((item,), "cream"), [at], 256, 256)
    reading = oracle.read_picture(image)
    found = oracle.locate(image, reading.objects[0], reading.background)
    assert np.allclose([found.x, found.y, found.radius], [at.x, at.y, at.radius], atol=0.05 / 256)


def test_an_image_without_objects_has_a_cleanness_too():
    background = render.render_background("navy", 256, 256).round().astype(np.uint8)
    assert oracle.cleanness(background) > 45
    assert oracle.cleanness(np.zeros((64, 64, 3), np.uint8)) < 30


# ----------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------


def test_a_reading_names_its_objects_from_left_to_right():
    scene = scenes.parse_caption(
        "a small red ring to the right of a large blue star, gray background"
    )
    image = render.render_scene(scene, 256, 256, np.random.default_rng(0))
    assert str(oracle.read_picture(image)) == "large blue star and small red ring on gray"


def test_scores_are_one_for_right_images_and_zero_for_others():
    caption = "a large red heart on a white background"
    image = render.render_scene(scenes.parse_caption(caption), 256, 256, np.random.default_rng(0))
    other = "a large red circle on a white background"
    assert oracle.score_pictures([image, image], [caption, other]) == [1.0, 0.0]
    assert oracle.score_caption(image, other).attributes == {
        "count": True,
        "colour": True,
        "shape": False,
        "size": True,
        "clean": True,
        "background": True,
    }


@pytest.mark.slow
def test_the_oracle_reads_fresh_renderings_and_rejects_one_wrong_attribute():
    rng, sizes = np.random.default_rng(2), list(image_sizes(evaluate.CHECKPOINT).values())
    right = rejected = 0
    for i in range(300):
        scene = scenes.sample_scene(rng)
        reading = oracle.read_picture(render.render_scene(scene, *sizes[i % len(sizes)], rng))
        right += oracle.score_reading(reading, scene).right
        other = scenes.change_one_attribute(scene, rng)
        rejected += not oracle.score_reading(reading, other).right
    assert right >= 297
    assert rejected >= 297


def test_the_oracle_rejects_a_torn_shape():
    scene = scenes.parse_caption("a large red circle on a white background")
    image = render.render_layout(scene, [render.Placement(0.5, 0.5, 0.2)], 256, 256)
    assert oracle.score_caption(image, scene).right
    image[:, 128:] = np.roll(image[:, 128:], 24, axis=0)
    assert not oracle.score_caption(image, scene).right


def test_an_image_without_a_readable_outline_is_measured_too():
    rng = np.random.default_rng(0)
    image = render.render_background("white", 256, 256).copy()
    for _ in range(30):  # scattered crumbs of red, no shape
        x, y = rng.integers(100, 160, 2)
        image[y : y + 4, x : x + 9] = (216, 34, 44)
    assert 0 < oracle.cleanness(image.astype(np.uint8)) < 40
