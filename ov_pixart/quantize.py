"""One component: apply a recipe, choose among its candidates by measurement, keep to the floor."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
from tqdm.auto import tqdm

from ov_pixart.calibration import CalibrationData, progress_bar
from ov_pixart.checks import read_json
from ov_pixart.compress import (
    compress_to_4_bits,
    compress_to_8_bits,
    equalize_columns,
    ignored_scope,
    int4_group_size,
    matching_layers,
    weighted_layers,
)
from ov_pixart.ir import (
    LARGE_BYTES,
    constants,
    ir_files,
    is_large,
    read_ir,
    save_ir,
    store_runtime_options,
)
from ov_pixart.memory import release_memory
from ov_pixart.presets import FLOATING_SHARE, FLOORS, Recipe
from ov_pixart.quality import (
    Judge,
    Sample,
    hold_out,
    judge_unrounded,
    leave_floating,
    rounded_inputs,
    spread,
)
from ov_pixart.quiet import silent_nncf
from ov_pixart.upstream import calibration_outputs_first, free_weights_while_compressing

# Samples to try a candidate with. With eight, differences between candidates drown in noise.
_TRIAL_SAMPLES = 12


def optimize_component(
    source: Path,
    name: str,
    recipe: Recipe,
    data: CalibrationData,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Apply a recipe to one component of `source` and write it to `folder`.

    Returns what was measured: "signal_to_error_db" of the output on samples that calibration never
    saw, "chosen" among "candidates", and the layers left "floating". Empty where nothing can be
    measured: without data, and for T5-XXL, which would have to run in 16 bits.

    Warns where a component stays below its floor, see FLOORS; the DiT and the VAE decoder then
    keep their 16 bits.
    """
    shutil.copyfile(source / name / "config.json", folder / "config.json")
    if recipe.weights is None and not recipe.options:
        _copy_ir(source / name, folder)
        return {}
    samples, judge = [], None
    if recipe.needs_data or (data.prompts and not is_large(source / name)):
        samples, held_out = hold_out(data.samples(name, progress=progress))
        judge = Judge(read_ir(source / name), held_out)
        release_memory()  # the source was compiled in 32 bits
    total = len(samples) if recipe.needs_data else 0
    with (
        progress_bar(f"Calibrating {name}", total, "sample", progress) as bar,
        free_weights_while_compressing(),
        calibration_outputs_first(),
        silent_nncf(),
    ):
        recipe, measured = _choose(source / name, recipe, samples, judge, bar)
        if recipe.smooth_quant >= 0:  # reads the samples twice: half of many cost 0.2 dB
            samples = samples[: max(2 * _TRIAL_SAMPLES, len(samples) // 2)]
        model = _apply(source / name, recipe, samples, bar)
    if judge:
        measured |= _keep_to_floor(model, dict(recipe.options), judge, FLOORS[name])
        if measured["signal_to_error_db"] < FLOORS[name]:
            measured |= _fall_back(name, measured["signal_to_error_db"])
    if measured.get("kept_in_16_bits"):
        _copy_ir(source / name, folder)
    else:
        store_runtime_options(model, **dict(recipe.options))
        save_ir(model, folder, compress_to_fp16=True)
    return measured


def _copy_ir(source: Path, folder: Path) -> None:
    for file in ir_files(source):
        shutil.copyfile(file, folder / file.name)


def _choose(
    folder: Path, recipe: Recipe, samples: list[Sample], judge: Judge | None, bar: tqdm
) -> tuple[Recipe, dict[str, Any]]:
    """The candidate with the best signal to error, in dB, after a few samples; all figures."""
    candidates = recipe.candidates()
    if judge is None or len(candidates) == 1:
        return recipe, {}
    few = spread(samples, _TRIAL_SAMPLES)
    figures = {}
    for label, candidate in candidates.items():
        model = _apply(folder, candidate, few, bar)
        figures[label] = round(judge(model, dict(candidate.options)), 2)
        del model
        release_memory()
    chosen = max(figures, key=figures.get)
    return candidates[chosen], {"chosen": chosen, "candidates": figures}


def _apply(folder: Path, recipe: Recipe, samples: list[Sample], bar: tqdm) -> ov.Model:
    """The component in `folder` after `apply_recipe`; NNCF's progress is shown in a bar."""
    passes = recipe.fits_weights + recipe.activations * (1 + (recipe.smooth_quant >= 0))
    bar.reset(passes * len(samples))
    config = read_json(folder / "config.json")
    return apply_recipe(read_ir(folder), recipe, config, samples, bar.update)


def _keep_to_floor(
    model: ov.Model, options: dict[str, Any], judge: Judge, floor: float
) -> dict[str, Any]:
    """Leave activations floating, those first that gain most, until the floor is reached.

    No more than FLOATING_SHARE of the multiply-adds. Returns the signal to error, in dB, and the
    layers.
    """
    reached, floating, share = judge(model, options), [], 0.0
    if reached < floor:
        inputs = rounded_inputs(model, judge.samples[0])
        without = judge_unrounded(model, [one.name for one in inputs], judge)
        gains = [(db - reached) / one.share for one, db in zip(inputs, without, strict=True)]
        for _, one in sorted(zip(gains, inputs, strict=True), key=lambda pair: -pair[0]):
            if reached < floor and share + one.share <= FLOATING_SHARE:
                leave_floating(model, {one.name})
                reached, share = judge(model, options), share + one.share
                floating += one.layers
    return {"signal_to_error_db": round(reached, 2), "floating": floating}


def _fall_back(name: str, reached: float) -> dict[str, Any]:
    """Say that a component is below its floor; the text encoder may be too large for 16 bits."""
    keeps = name != "text_encoder"
    remedy = "it keeps its 16 bits" if keeps else "convert it to 16 bits if memory allows"
    warnings.warn(
        f"{name} is too far from its source in this preset: signal to error is {reached:.1f} dB, "
        f"below {FLOORS[name]:g} dB: {remedy}.",
        stacklevel=5,
    )
    return {"kept_in_16_bits": keeps}


def apply_recipe(
    model: ov.Model,
    recipe: Recipe,
    config: dict[str, Any],
    samples: list[dict[str, np.ndarray]],
    on_sample: Callable[[], Any] = lambda: None,
) -> ov.Model:
    """Compress the weights of layers with floating activations, then quantize all others.

    Columns of all weights are equalized before, unless the component is large: that takes 16-bit
    copies of the weights that change.

    `config`: the component's, for the size of INT4 groups. `on_sample` is called for each sample
    that NNCF reads.
    """

    def read(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        on_sample()
        return sample

    dataset = nncf.Dataset(samples, read) if samples else None
    if sum(weights.nbytes for weights in constants(model)) < LARGE_BYTES:
        equalize_columns(model)
    weighted, floating = weighted_layers(model), matching_layers(model, recipe.floating)
    weights_only = matching_layers(model, recipe.weights_only) if recipe.activations else weighted
    if recipe.weights == "int4":
        sensitive = matching_layers(model, recipe.sensitive)
        in_4_bits = (weights_only & weighted) - floating - sensitive
        model = compress_to_4_bits(
            model,
            int4_group_size(config),
            weighted - in_4_bits,
            dataset if recipe.fits_weights else None,
            scale_estimation=recipe.scale_estimation,
            gptq=recipe.gptq,
        )
    if weights_only:
        model = compress_to_8_bits(model, (weighted - weights_only) | floating)
    if not recipe.activations:
        return model
    smooth_quant = nncf.AdvancedSmoothQuantParameters(matmul=recipe.smooth_quant)
    return nncf.quantize(
        model,
        dataset,
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if recipe.is_transformer else None,
        ignored_scope=ignored_scope(weights_only | floating),
        # bias correction takes two fifths of the time, and changes PixArt-tiny, its twins with
        # outliers included, by 0.1 dB at most
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=smooth_quant, disable_bias_correction=True
        ),
    )
