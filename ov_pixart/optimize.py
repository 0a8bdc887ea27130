"""`optimize_pipeline`: a preset applied to the three components of a converted pipeline."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nncf

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
from ov_pixart.checks import check, is_count, public
from ov_pixart.cost import BYTES_PER_WEIGHT
from ov_pixart.ir import (
    IR_NAME,
    constants,
    ir_files,
    is_large,
    is_quantized,
    read_ir,
)
from ov_pixart.memory import release_memory
from ov_pixart.presets import PRESETS, Recipe
from ov_pixart.quantize import optimize_component
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
from ov_pixart.summary import quality_text

_COPIED = ("tokenizer", "scheduler", "vae_encoder")  # the last is seldom there and seldom runs


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

    Each component is measured against its source, on calls that calibration never sees, in presets
    with calibration data; the best of a preset's variants is written. `summarize_models` shows the
    figures. T5-XXL is not measured: it would have to run in 16 bits. Warns where a component is
    too far from its source; DiT and VAE decoder then keep their 16 bits.

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
        for name in filter(lambda name: (source / name).is_dir(), _COPIED):
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
        if is_large(source / name):
            return replace(recipe, scale_estimation=False, gptq=False, choices={})
        return recipe
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
                    made = optimize_component(source, name, recipes[name], data, folder, progress)
                    write_record({**record, "measured": made}, folder / OPTIMIZATION)
                release_memory()
            bar.update()
        bar.set_description(_summary(output))


def _summary(output: Path) -> str:
    """The last line of the progress bar: the quality of each component, as far as measured."""
    quality = {name: quality_text(output / name) for name in COMPONENTS}
    return "; ".join(["Optimised", *(f"{name} {text}" for name, text in quality.items() if text)])


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
    results = {key: found.get(key) for key in ("measured", "files")}
    same = found == {**record, **results}
    return same and find_damage(folder, found, hashed=True) is None
