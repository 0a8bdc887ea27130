"""The vocabulary of scenes, their captions and their layout."""

import numpy as np
import pytest

from ov_pixart_helper import image_sizes
from pixart_tiny import evaluate, render, scenes

SIZES = list(image_sizes(evaluate.CHECKPOINT).values())


def test_every_caption_reads_back_into_its_scene():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        scene = scenes.sample_scene(rng)
        assert scenes.parse_caption(scenes.describe(scene, rng)) == scene


def test_a_caption_may_leave_sizes_and_background_open():
    scene = scenes.parse_caption("a red heart above a blue box")
    assert scene == scenes.Scene(
        (scenes.SceneObject("red", "heart", None), scenes.SceneObject("blue", "square", None)),
        None,
        "above",
    )


@pytest.mark.parametrize(
    "caption", ["", "a cat", "a red heart and a blue ring on a white backdrop"]
)
def test_a_caption_outside_the_grammar_is_refused_by_name(caption):
    with pytest.raises(ValueError, match="caption="):
        scenes.parse_caption(caption)


def test_training_never_sees_what_is_held_out():
    rng = np.random.default_rng(1)
    drawn = [scenes.sample_training_scene(rng) for _ in range(3000)]
    assert not any(scene.is_held_out() for scene in drawn)
    seen = {(t.colour, t.shape) for scene in drawn for t in scene.objects}
    everything = {(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES}
    assert everything - seen == scenes.HELD_OUT_PAIRS


def test_every_evaluation_caption_is_held_out_and_fixed(tmp_path):
    rows = evaluate.read_captions()
    assert len(rows) == len({caption for caption, _ in rows}) == 200
    for caption, _ in rows:
        scene = scenes.parse_caption(caption)
        assert scene.has_held_out_pair()
        assert scene.relation is None or scene.has_held_out_triple()
    evaluate.write_captions(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == evaluate.CAPTIONS.read_text()


def test_a_mirrored_triple_is_held_out_too():
    scene = scenes.parse_caption(
        "a big red star to the right of a big red circle on a mint backdrop"
    )
    assert scene.has_held_out_triple()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_objects_stand_apart_inside_the_image_as_the_relation_says(height, width):
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        layout = render.place(scene, height, width, rng)
        size = np.array([width, height]) / min(height, width)
        for at in layout:
            centre = np.array([at.x, at.y])
            assert (centre - at.radius > 0.02).all() and (centre + at.radius < size - 0.02).all()
        if scene.relation is not None:
            first, second = (np.array([at.x, at.y]) for at in layout)
            towards = np.array(scenes.RELATIONS[scene.relation])
            along = (first - second) @ towards
            assert along > abs((first - second) @ towards[::-1])
            assert along > layout[0].radius + layout[1].radius + 0.05
