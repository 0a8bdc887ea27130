"""Tables: the IRs of a folder, and the presets."""

from pathlib import Path

import openvino as ov
import pandas as pd

from ov_pixart.checkpoint import COMPONENTS
from ov_pixart.ir import IR_NAME, read_ir
from ov_pixart.presets import PRESETS, Recipe
from ov_pixart.storage import OPTIMIZATION, read_record


def summarize_models(ov_dir: str | Path) -> pd.DataFrame:
    """One row per component in an OpenVINO folder: weights on disk in MB, quality, inputs, output.

    The quality of an optimised component is its signal to error, in dB, against the component it
    was made from, as `optimize_pipeline` has measured it: no column where it has not. A `?` in a
    shape is a dimension of any length. Raises FileNotFoundError where there is no component.
    """
    rows = {}
    for name in COMPONENTS:
        file = Path(ov_dir) / name / IR_NAME
        if file.is_file():
            model = read_ir(file)
            size = file.with_suffix(".bin").stat().st_size / 1e6
            ports = [_ports_text(model.inputs), _ports_text(model.outputs)]
            rows[name] = [round(size, 2), quality_text(file.parent), *ports]
    if not rows:
        raise FileNotFoundError(f"ov_dir={str(ov_dir)!r} holds no model: convert one first.")
    columns = ["size, MB", "quality", "inputs", "output"]
    table = pd.DataFrame.from_dict(rows, "index", columns=columns)
    return table if (table["quality"] != "").any() else table.drop(columns="quality")


def quality_text(component: Path) -> str:
    """What `optimize_pipeline` measured of a component, such as "31.9 dB (SmoothQuant 0.8)"."""
    measured = read_record(component / OPTIMIZATION).get("measured") or {}
    if "signal_to_error_db" not in measured:
        return ""
    notes = [name for name in [measured.get("chosen")] if name]
    if measured["floating"]:
        count = len(measured["floating"])
        notes.append(f"{count} layer{'s' if count > 1 else ''} in floating point")
    if measured.get("kept_in_16_bits"):
        notes = ["too low: kept in 16 bits"]
    text = f"{measured['signal_to_error_db']:.1f} dB"
    return f"{text} ({', '.join(notes)})" if notes else text


def _ports_text(ports: list[ov.Output]) -> str:
    shapes = {port.get_any_name(): port.get_partial_shape() for port in ports}
    return ", ".join(f"{name} {_shape_text(shape)}" for name, shape in shapes.items())


def _shape_text(shape: ov.PartialShape) -> str:
    lengths = ("?" if axis.is_dynamic else str(axis.get_length()) for axis in shape)
    return f"({', '.join(lengths)})"


def summarize_presets() -> pd.DataFrame:
    """One row per preset, one column per component: bits of weights and activations, and data.

    "W8 A8" stores weights and computes in 8-bit integers, "W4" keeps floating activations, "W8 A8*"
    quantizes activations as they come. "Calibrated": the components that need calibration data.
    """
    rows = {}
    for name, preset in PRESETS.items():
        recipes = {component: getattr(preset, component) for component in COMPONENTS}
        rows[name] = {component: _recipe_text(recipe) for component, recipe in recipes.items()}
        data = [component for component, recipe in recipes.items() if recipe.needs_data]
        rows[name]["calibrated"] = ", ".join(data) or "–"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("preset")


def _recipe_text(recipe: Recipe) -> str:
    bits = {None: "W16", "int8": "W8", "int4": "W4"}[recipe.weights]
    if recipe.activations:
        if r"/MatMul" in recipe.weights_only:
            return "W8, A8 outside MatMul"
        return "W8 A8" if recipe.weights == "int8" else f"W8 A8, some {bits}"
    is_dynamic = "DYNAMIC_QUANTIZATION_GROUP_SIZE" in dict(recipe.options)
    return f"{bits} A8*" if is_dynamic else bits
