"""Presets that measure themselves: the judge, candidates, the floor, and outliers in weights."""

import json
import math
import warnings

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ov_pixart import quality, quantize
from ov_pixart.compress import equalize_columns
from ov_pixart_helper import (
    COMPONENTS,
    convert_pipeline,
    judge_preset,
    optimize_pipeline,
    summarize_models,
)
from pixart_tiny.twins import TWINS, build_twin
from tests.support.graphs import rounded_inputs
from tests.support.optimized import DATA, generate_small

rng = np.random.default_rng(0)


def linear(weights: np.ndarray, *, read_twice: bool = False) -> ov.Model:
    """`(n, columns)` → `(n, rows)` float32, weights in float16 as in an IR."""
    data = ops.parameter([-1, weights.shape[1]], np.float32, name="x")
    matrix = ops.convert(ops.constant(weights.astype(np.float16)), "f32")
    output = ops.matmul(data, matrix, False, True)
    if read_twice:
        output = ops.add(output, ops.matmul(data, matrix, False, True))
    return ov.Model([output], [data], "linear")


def run(model: ov.Model, x: np.ndarray) -> np.ndarray:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


def stored_weights(model: ov.Model) -> np.ndarray:
    matrices = [op.data for op in model.get_ops() if op.get_type_name() == "Constant"]
    return next(matrix for matrix in matrices if matrix.dtype == np.float16)


# ---- samples and the judge ----------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [4, 5, 10])
@pytest.mark.parametrize("images", [3, 10, 20])
def test_spread_samples_come_from_all_steps(per_image, images):
    samples = [{"step": i % per_image} for i in range(images * per_image)]
    steps = {sample["step"] for sample in quality.spread(samples, 8)}
    assert len(steps) >= min(per_image, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 100])
def test_what_is_held_out_does_not_calibrate(count):
    samples = [{"x": np.array(i)} for i in range(count)]
    rest, held_out = quality.hold_out(samples)
    assert rest and held_out and len(held_out) <= quality.HELD_OUT
    numbers = [{int(sample["x"]) for sample in part} for part in (rest, held_out)]
    assert count == 1 or not numbers[0] & numbers[1]
    assert numbers[0] | numbers[1] == set(range(count))


def test_the_judge_measures_signal_to_error_in_decibels():
    weights = rng.normal(size=(8, 16))
    samples = [{"x": rng.normal(size=(4, 16)).astype(np.float32)} for _ in range(3)]
    judge = quality.Judge(linear(weights), samples)
    assert judge(linear(weights), {}) == math.inf
    assert judge(linear(weights * 1.125), {}) == pytest.approx(20 * math.log10(8), abs=0.1)


# ---- columns of weights -------------------------------------------------------------------------


def test_lost_columns_are_brought_to_the_others_size_and_the_output_stays():
    weights = rng.normal(size=(32, 64))
    weights[:, 3] /= 150
    weights[:, 7] /= 20
    weights[5] *= 300  # a large row has its own scale, and must not hide the columns
    x = rng.normal(size=(10, 64)).astype(np.float32)
    model = linear(weights)
    before = run(model, x)
    equalize_columns(model)
    assert np.abs(run(model, x) - before).max() < 1e-3 * np.abs(before).max()
    sizes = np.sqrt(np.square(np.delete(stored_weights(model), 5, axis=0).astype(float)).mean(0))
    assert sizes.max() / sizes.min() < 4


def test_even_columns_are_left_alone():
    model = linear(rng.normal(size=(512, 64)))
    before = stored_weights(model).copy()
    equalize_columns(model)
    assert np.array_equal(stored_weights(model), before)
    assert not [op for op in model.get_ops() if op.get_type_name() == "Multiply"]


def test_weights_that_two_layers_read_are_left_alone():
    weights = rng.normal(size=(32, 64)) * np.where(np.arange(64) == 3, 0.01, 1)
    model = linear(weights, read_twice=True)
    equalize_columns(model)
    assert not [op for op in model.get_ops() if op.get_type_name() == "Multiply"]


# ---- the floor ----------------------------------------------------------------------------------


def measured(folder, name):
    return json.loads((folder / name / "optimization.json").read_text())["measured"]


@pytest.mark.slow
def test_what_was_measured_is_recorded_and_shown(optimized):
    folder = optimized("int8")
    table = summarize_models(folder)
    for name in COMPONENTS:
        figure = measured(folder, name)["signal_to_error_db"]
        assert table.loc[name, "quality"].startswith(f"{figure:.1f} dB")
    chosen = measured(folder, "transformer")
    assert chosen["candidates"][chosen["chosen"]] == max(chosen["candidates"].values())


@pytest.mark.slow
def test_a_component_below_its_floor_leaves_the_worst_layers_floating(
    optimized, fp16, tmp_path, monkeypatch
):
    before = measured(optimized("int8"), "transformer")["signal_to_error_db"]
    monkeypatch.setitem(quantize.FLOORS, "transformer", before + 0.01)
    monkeypatch.setattr(quantize, "FLOATING_SHARE", 0.5)  # of a DiT with two blocks
    folder = optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)
    found = measured(folder, "transformer")
    assert found["floating"] and found["signal_to_error_db"] > before
    rounded = [rounded_inputs(one, "transformer") for one in (folder, optimized("int8"))]
    assert 0 < len(rounded[0]) < len(rounded[1])
    assert "in floating point" in summarize_models(folder).loc["transformer", "quality"]


@pytest.mark.slow
def test_a_hopeless_component_keeps_its_16_bits_and_says_so(fp16, tmp_path, monkeypatch):
    monkeypatch.setitem(quantize.FLOORS, "transformer", 200.0)
    with pytest.warns(UserWarning, match=r"transformer .* below 200 dB: it keeps its 16 bits"):
        folder = optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)
    weights = [one / "transformer" / "openvino_model.bin" for one in (folder, fp16)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert summarize_models(folder).loc["transformer", "quality"].endswith("kept in 16 bits)")
    assert generate_small(folder).std() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # finished: nothing is measured again
        optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)


@pytest.mark.slow
def test_a_preset_is_judged_on_ones_own_prompts_in_one_call(optimized, fp16):
    folder = optimized("int8-weights")
    table = judge_preset(fp16, folder, "int8-weights", prompts=["a red star", "a blue ring"])
    assert list(table.index) == ["source", "int8-weights"]
    assert table.loc["source", "psnr_db"] == math.inf > table.loc["int8-weights", "psnr_db"] > 5
    assert {f"{name}, quality" for name in COMPONENTS} <= set(table.columns)


# ---- outliers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_smoothing_is_chosen_for_a_twin_with_outliers(tmp_path):
    twin = build_twin(tmp_path / "twin", TWINS["40x in 4%"])
    fp16 = convert_pipeline(twin, tmp_path / "fp16")
    folder = optimize_pipeline(fp16, tmp_path / "int8", "int8", num_samples=25, progress=False)
    found = measured(folder, "transformer")
    assert found["chosen"].startswith("SmoothQuant")
    assert max(found["candidates"].values()) > found["candidates"]["no SmoothQuant"] + 1
    assert found["signal_to_error_db"] > 25
    assert measured(folder, "text_encoder")["signal_to_error_db"] > 35
