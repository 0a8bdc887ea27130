"""`show_images`: side by side, in one height, each under its name."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import ov_pixart_helper as helper

IMAGES = {
    "square": Image.new("RGB", (64, 64), "red"),
    "wide array": np.full((64, 128, 3), 200, np.uint8),
    "tall": Image.new("RGB", (48, 96), "blue"),
}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_images_stand_under_their_names_in_one_height(count):
    images = dict(list(IMAGES.items())[:count])
    figure = helper.show_images(images)
    figure.canvas.draw()
    assert [ax.get_title() for ax in figure.axes] == list(images)
    for ax, image in zip(figure.axes, images.values(), strict=True):
        assert np.array_equal(ax.get_images()[0].get_array(), np.asarray(image))
        assert not ax.axison
    heights = [ax.get_window_extent().height for ax in figure.axes]
    assert max(heights) == pytest.approx(min(heights), rel=0.05)


def test_a_notebook_shows_the_figure_once():
    """pyplot would show every figure that it still holds at the end of a cell."""
    helper.show_images(IMAGES)
    assert plt.get_fignums() == []


def test_the_earlier_name_still_works():
    assert helper.show_pictures is helper.show_images
