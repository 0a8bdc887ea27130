"""`summarize_models`: the IRs of a folder as a table."""

from pathlib import Path

import openvino as ov
import pandas as pd

from ov_pixart.checkpoint import COMPONENTS
from ov_pixart.ir import IR_NAME, read_ir


def summarize_models(ov_dir: str | Path) -> pd.DataFrame:
    """One row per component in an OpenVINO folder: weights on disk in MB, inputs, output.

    A `?` in a shape is a dimension of any length. Raises FileNotFoundError where there is no
    component.
    """
    rows = {}
    for name in COMPONENTS:
        file = Path(ov_dir) / name / IR_NAME
        if file.is_file():
            model = read_ir(file)
            size = file.with_suffix(".bin").stat().st_size / 1e6
            rows[name] = [round(size, 2), _ports_text(model.inputs), _ports_text(model.outputs)]
    if not rows:
        raise FileNotFoundError(f"ov_dir={str(ov_dir)!r} holds no model: convert one first.")
    return pd.DataFrame.from_dict(rows, "index", columns=["size, MB", "inputs", "output"])


def _ports_text(ports: list[ov.Output]) -> str:
    shapes = {port.get_any_name(): port.get_partial_shape() for port in ports}
    return ", ".join(f"{name} {_shape_text(shape)}" for name, shape in shapes.items())


def _shape_text(shape: ov.PartialShape) -> str:
    lengths = ("?" if axis.is_dynamic else str(axis.get_length()) for axis in shape)
    return f"({', '.join(lengths)})"
