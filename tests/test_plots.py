"""Figures: units, numbers on bars, images in pairs, and none that a notebook shows twice."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ov_pixart.compare import Comparison
from ov_pixart.plots import add_bars, amplified_difference, show_images
from tests.support.comparisons import gray, known_comparison


@pytest.fixture(scope="module")
def known() -> Comparison:
    return known_comparison()


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(plt.Text))


def shown_images(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.get_images()]


def test_plots_name_units_labels_and_numbers(known):
    figure = known.plot()
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_title(loc="left")
    for word in ("MB", "ms", "dB", "Likeness to a", "equal", "48.1", "700", "text encoder", "DiT"):
        assert word in texts(figure), word


def test_bars_of_components_add_up_to_the_number_beside_them(known):
    size, _, time, *_ = known.plot().axes
    assert sum(bar.get_width() for bar in size.patches) == pytest.approx(6 + 3)
    assert sum(bar.get_width() for bar in time.patches) == pytest.approx(2 + 4)


def test_plots_without_a_scorer_show_ssim(known):
    scoreless = Comparison(**{**vars(known), "scores": {"a": [], "b": []}})
    assert "SSIM" in texts(scoreless.plot())
    assert scoreless.to_dataframe()["score"].isna().all()


def test_images_are_shown_in_pairs_with_their_amplified_difference(known):
    figure = known.show_images(count=2, amplification=10)
    assert "“red”, seed 1" in texts(figure)
    assert "“blue”" not in texts(figure)
    assert "difference × 10, 48.1 dB" in texts(figure)
    images = shown_images(figure)
    assert len(images) == 6  # two images and a difference, twice
    assert np.unique(images[2]) == [138]  # gray, and ten times one level


def test_labels_choose_what_is_shown_beside_the_reference(known):
    assert len(shown_images(known.show_images(labels=["a"], count=9))) == 3
    with pytest.raises(ValueError, match=r"labels='c' does not work.*'a', 'b'"):
        known.show_images(labels=["c"])
    with pytest.raises(ValueError, match="count=0"):
        known.show_images(count=0)


def test_differences_end_at_black_and_white():
    assert np.unique(amplified_difference(gray(200), gray(100), 8)) == [255]
    assert np.unique(amplified_difference(gray(100), gray(200), 8)) == [0]
    assert np.unique(amplified_difference(gray(100), gray(100), 8)) == [128]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_show_images_puts_each_under_its_name(count):
    wide = np.full((10, 30, 3), 200, np.uint8)
    images = {f"image {i}": gray(50 * i) if i else wide for i in range(count)}
    figure = show_images(images)
    assert [ax.get_title() for ax in figure.axes] == list(images)
    for shown, image in zip(shown_images(figure), images.values(), strict=True):
        assert np.array_equal(shown, np.asarray(image))


def test_bars_say_equal_for_the_reference_and_nothing_for_a_missing_number():
    figure, ax = plt.subplots()
    add_bars(ax, pd.Series({"a": np.inf, "b": np.nan, "c": 2.0}), "{:.1f}", colours={"c": "red"})
    plt.close(figure)
    assert [text.get_text() for text in ax.texts] == ["equal", "–", "2.0"]
    assert [bar.get_width() for bar in ax.patches] == [2.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


def test_figures_are_handed_out_once(known):
    """A notebook would show a second time what pyplot still holds."""
    known.plot(), known.show_images(), show_images({"a": gray(1)})
    assert plt.get_fignums() == []
