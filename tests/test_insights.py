"""A look inside: the film strip ends in the image, words are found where their objects are."""

import numpy as np
import openvino as ov
import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import ov_pixart_helper as ovp
from tests.support.parity import F32, SMALL, load_exact, noise_inputs
from tests.support.refused import refused

CALL = {name: value for name, value in SMALL.items() if name not in ("prompt", "output_type")}


def test_the_film_strip_ends_in_the_image(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++"
    )
    strip = ovp.film_strip(
        pipeline, "a star", [1, 3], generator=torch.Generator().manual_seed(0), **CALL
    )
    image = pipeline("a star", generator=torch.Generator().manual_seed(0), **CALL).images[0]
    assert list(strip) == ["step 1", "step 3"]
    assert np.abs(np.asarray(strip["step 3"], int) - np.asarray(image, int)).max() <= 1
    assert np.abs(np.asarray(strip["step 1"], int) - np.asarray(image, int)).max() > 1
    assert "step" not in vars(pipeline.scheduler)  # the scheduler is as it was


def test_a_step_that_is_never_taken_is_refused(fresh_pipeline):
    with refused(ValueError, "steps=9", "from 1 to 3"):
        ovp.film_strip(fresh_pipeline("alpha"), "a star", [9], **CALL)


def test_word_maps_have_one_map_per_word_with_a_mean_of_one(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    inputs = [port.get_any_name() for port in pipeline.transformer.model.outputs]
    maps = ovp.word_maps(pipeline, "a star above a hill", **CALL)
    assert list(maps.maps) == ["a", "star", "above", "a 2", "hill"]
    for values in maps.maps.values():
        assert values.shape == (4, 4)  # tokens of 16 pixels
        assert values.mean() == pytest.approx(1, rel=1e-4)
    x, y = maps.peak("star")
    assert 0 < x < 64 and 0 < y < 64
    assert [p.get_any_name() for p in pipeline.transformer.model.outputs] == inputs  # unchanged


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded checkpoint in 32 bits."""
    folder = tmp_path_factory.mktemp("tiny")
    return load_exact(
        ovp.convert_pipeline("assets/pixart-tiny", folder, weight_format="fp32"), ov_config=F32
    )


@pytest.mark.slow
def test_nouns_are_strongest_in_their_objects(tiny):
    from pixart_tiny.tutorial import TINY

    for seed in (10, 11):
        generator = torch.Generator().manual_seed(seed)
        lines = list(TINY.locate_words(ovp.word_maps(tiny, TINY.two_objects, generator=generator)))
        assert lines == [
            "“ring” is strongest inside the outline of the large blue ring",
            "“star” is strongest inside the outline of the small yellow star",
        ]


def test_a_layers_weights_and_input_are_those_of_torch(converted, torch_pipeline):
    model = ov.Core().read_model(converted("alpha") / "transformer" / "openvino_model.xml")
    transformer = torch_pipeline("alpha").transformer
    layer = transformer.transformer_blocks[1].ff.net[2]
    weights = ovp.layer_weights(model, "transformer_blocks.1.ff.net.2")
    assert np.array_equal(weights, layer.weight.detach().numpy())

    seen = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    inputs = noise_inputs()
    with torch.no_grad():
        transformer(**inputs, added_cond_kwargs={"resolution": None, "aspect_ratio": None})
    hook.remove()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    ours = ovp.layer_input(model, "transformer_blocks.1.ff.net.2", arrays)
    assert np.abs(ours - seen[0].flatten(0, 1).numpy()).max() < 1e-4
    with refused(ValueError, "layer='nothing'", "MatMul"):
        ovp.layer_weights(model, "nothing")
    with refused(ValueError, "layer=", "computes in integers"):
        ovp.calibrated_range(model, "transformer_blocks.1.ff.net.2")


def test_figures_of_the_tutorial_are_drawn():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 128), dtype=np.float32)
    titles = [ax.get_title() for ax in ovp.weight_grid_figure(weights).axes]
    assert "INT8" in titles[0] and "INT4" in titles[1]
    int8, int4 = (float(title.split(": ")[1].split()[0]) for title in titles)
    assert int8 > int4 + 15  # 4 bits fewer, 6 dB each
    values = rng.standard_normal((64, 8), dtype=np.float32)
    left, right = ovp.activation_range_figure(values, -4.0, 4.0).axes
    levels = [int(ax.get_title().split("\n")[1].split()[0]) for ax in (left, right)]
    assert levels[0] > 100 > 40 > levels[1]
    points = [
        {"version": "a", "evaluations": n, "one_object": 90, "two_objects": 80} for n in (2, 4)
    ]
    axes = ovp.evaluations_figure(pd.DataFrame(points)).axes
    assert [ax.get_ylim()[0] for ax in axes] == [80, 80]
