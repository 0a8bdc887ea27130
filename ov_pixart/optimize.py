"""`optimize_pipeline`: a preset applied to the three components of a converted pipeline."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov

from ov_pixart.calibration import (
    DEFAULT_NUM_SAMPLES,
    CalibrationData,
    choose_prompts,
    progress_bar,
)
from ov_pixart.checkpoint import (
    COMPONENTS,
    MODEL_INDEX,
    check_openvino_folder,
    check_replaceable,
    is_openvino_folder,
    read_model_index,
)
from ov_pixart.checks import check, is_count, public, read_json
from ov_pixart.compress import (
    compress_to_4_bits,
    compress_to_8_bits,
    ignored_scope,
    int4_group_size,
    matching_layers,
    weighted_layers,
)
from ov_pixart.cost import BYTES_PER_WEIGHT
from ov_pixart.ir import (
    IR_NAME,
    constants,
    ir_files,
    is_large,
    is_quantized,
    read_ir,
    save_ir,
    store_runtime_options,
)
from ov_pixart.memory import release_memory
from ov_pixart.presets import PRESETS, Recipe
from ov_pixart.quiet import silent_nncf
from ov_pixart.storage import (
    OPTIMIZATION,
    check_disk,
    check_output,
    find_damage,
    fingerprint,
    locked,
    read_record,
    staged,
    write_json,
    write_record,
)
from ov_pixart.upstream import calibration_outputs_first, free_weights_while_compressing


@public
def optimize_pipeline(
    ov_dir: str | Path,
    output_dir: str | Path,
    preset: str = "int8",
    *,
    calibration_prompts: str | Path | list[str] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a smaller, faster copy of an OpenVINO pipeline and return its folder.

    `ov_dir`: a folder of `convert_pipeline` in 16 or 32 bits. Its text encoder may have 8 or 4 bits
    already, and is then copied. `preset`: a name in PRESETS.
    `calibration_prompts`: captions, or a source for `load_calibration_prompts`; the shipped ones by
    default. `num_samples`: how many calls of the DiT to calibrate with, five from each image.

    Images for calibration are generated once and kept in the folder `calibration` next to
    `output_dir`, for other presets with the same source, captions and seed; where the text encoder
    exceeds 2 GB, for presets that also treat it alike. Presets that need no data ignore
    `calibration_prompts`, `num_samples` and `seed`. Components that an earlier call has finished
    are kept.

    Raises ValueError for arguments that do not work and for a pipeline that is not converted, or
    quantized already, FileNotFoundError for a missing or incomplete folder, OSError where the disk
    is too small.
    """
    rule = "a whole number"
    check(isinstance(seed, int) and not isinstance(seed, bool), "seed", seed, rule)
    source, output = Path(ov_dir), Path(output_dir)
    recipes = _check_optimize(source, output, preset)
    prompts = []
    if PRESETS[preset].needs_data:
        num_samples = DEFAULT_NUM_SAMPLES if num_samples is None else num_samples
        check(is_count(num_samples), "num_samples", num_samples, "a whole number from 1")
        prompts = choose_prompts(calibration_prompts, source, num_samples, seed)
    data = CalibrationData(source, output.parent / "calibration", prompts, num_samples, seed)
    if is_large(source / "text_encoder"):
        # in 16 bits it takes 10 GB; the one that this call writes first takes half
        data.encode_with(output / "text_encoder", asdict(recipes["text_encoder"]))
    with locked(output):
        _optimize_all(source, output, recipes, data, progress)
        for name in ("tokenizer", "scheduler"):
            with staged(output / name) as folder:
                for file in filter(Path.is_file, (source / name).iterdir()):
                    shutil.copyfile(file, folder / file.name)
        write_json(read_model_index(source), output / MODEL_INDEX)
    return output


def _check_optimize(source: Path, output: Path, preset: str) -> dict[str, Recipe]:
    """Raise before anything is computed, or return the recipe of each component."""
    if preset not in PRESETS:
        choices = ", ".join(repr(name) for name in PRESETS)
        raise ValueError(f"preset={preset!r} is unknown: use one of {choices}.")
    if not source.is_dir():
        raise FileNotFoundError(f"ov_dir={str(source)!r} is no folder: check the path.")
    read_model_index(source)
    if not is_openvino_folder(source):
        raise ValueError(
            f"ov_dir={str(source)!r} is not converted to OpenVINO yet: call convert_pipeline first."
        )
    check_openvino_folder(source)
    check_output(output, [source], COMPONENTS)
    check_replaceable(output)
    recipes, disk = {}, 0.0
    for name in COMPONENTS:
        model = read_ir(source / name)
        recipes[name] = _choose_recipe(source, name, preset, quantized=is_quantized(model))
        if not (output / name / IR_NAME).is_file():
            bytes_each = BYTES_PER_WEIGHT.get(recipes[name].weights)
            weights = constants(model)
            disk += sum(one.size * bytes_each if bytes_each else one.nbytes for one in weights)
    check_disk(disk, output)
    return recipes


def _choose_recipe(source: Path, name: str, preset: str, *, quantized: bool) -> Recipe:
    """The preset's recipe for a component; a large text encoder does without fitted scales."""
    recipe = getattr(PRESETS[preset], name)
    if name == "text_encoder":
        if quantized:
            return Recipe()
        return replace(recipe, scale_estimation=False) if is_large(source / name) else recipe
    if quantized:
        raise ValueError(
            f"ov_dir={str(source)!r} is quantized already (its {name} is): start from a "
            "folder of convert_pipeline with weight_format='fp16'."
        )
    return recipe


def _optimize_all(
    source: Path, output: Path, recipes: dict[str, Recipe], data: CalibrationData, progress: bool
) -> None:
    """Optimise the components that are not finished, text encoder first."""
    records = {name: _record(source, name, recipes[name], data) for name in COMPONENTS}
    finished = {name: _is_finished(output / name, records[name]) for name in COMPONENTS}
    if not all(finished.values()):
        (output / MODEL_INDEX).unlink(missing_ok=True)
    with progress_bar("", len(COMPONENTS), "component", progress, leave=True) as bar:
        for name, record in records.items():
            bar.set_description(f"{'Keeping' if finished[name] else 'Optimising'} {name}")
            if not finished[name]:
                with staged(output / name) as folder:
                    optimize_component(source, name, recipes[name], data, folder, progress)
                    write_record(record, folder / OPTIMIZATION)
                release_memory()
            bar.update()
        bar.set_description("Optimised")


def _record(source: Path, name: str, recipe: Recipe, data: CalibrationData) -> dict[str, Any]:
    """Everything that determines an optimised component, for `_is_finished` to compare."""
    record = {
        "recipe": asdict(recipe),
        "source": fingerprint(ir_files(source / name)),
        "calibration": data.key if recipe.needs_data else None,
        "nncf": nncf.__version__,
    }
    return json.loads(json.dumps(record))  # tuples are lists from here on, as in the file


def _is_finished(folder: Path, record: dict[str, Any]) -> bool:
    """Whether `folder` holds a whole component with this record."""
    found = read_record(folder / OPTIMIZATION)
    same = found == {**record, "files": found.get("files")}
    return same and find_damage(folder, found, hashed=True) is None


# ---- one component ------------------------------------------------------------------------------


def optimize_component(
    source: Path,
    name: str,
    recipe: Recipe,
    data: CalibrationData,
    folder: Path,
    progress: bool,
) -> None:
    """Apply a recipe to one component of `source` and write it to `folder`."""
    shutil.copyfile(source / name / "config.json", folder / "config.json")
    if recipe.weights is None and not recipe.options:
        for file in ir_files(source / name):
            shutil.copyfile(file, folder / file.name)
        return
    samples = data.samples(name, progress=progress) if recipe.needs_data else []
    model = read_ir(source / name)
    config = read_json(source / name / "config.json")
    passes = recipe.scale_estimation + recipe.activations * (1 + (recipe.smooth_quant >= 0))
    total = passes * len(samples)
    with (
        progress_bar(f"Calibrating {name}", total, "sample", progress) as bar,
        free_weights_while_compressing(),
        calibration_outputs_first(),
        silent_nncf(),
    ):
        model = apply_recipe(model, recipe, config, samples, bar.update)
    store_runtime_options(model, **dict(recipe.options))
    save_ir(model, folder, compress_to_fp16=True)


def apply_recipe(
    model: ov.Model,
    recipe: Recipe,
    config: dict[str, Any],
    samples: list[dict[str, np.ndarray]],
    on_sample: Callable[[], Any] = lambda: None,
) -> ov.Model:
    """Compress the weights of layers with floating activations, then quantize all others.

    `config`: the component's, for the size of INT4 groups. `on_sample` is called for each sample
    that NNCF reads.
    """

    def read(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        on_sample()
        return sample

    dataset = nncf.Dataset(samples, read) if samples else None
    weighted, floating = weighted_layers(model), matching_layers(model, recipe.floating)
    weights_only = matching_layers(model, recipe.weights_only) if recipe.activations else weighted
    if recipe.weights == "int4":
        sensitive = matching_layers(model, recipe.sensitive)
        in_4_bits = (weights_only & weighted) - floating - sensitive
        fit = dataset if recipe.scale_estimation else None
        model = compress_to_4_bits(model, int4_group_size(config), weighted - in_4_bits, fit)
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
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth_quant),
    )
