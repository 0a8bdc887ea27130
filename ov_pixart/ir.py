"""OpenVINO IRs: read, write, reshape; the compile options stored in them; device names."""

import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15

from ov_pixart.checks import check, nearest_name, shortened

IR_NAME = "openvino_model.xml"

# ---- read and write -----------------------------------------------------------------------------


def read_ir(path: str | Path) -> ov.Model:
    """Read an IR, given its `.xml` file or the folder that holds one.

    Raises FileNotFoundError where there is none, ValueError where the graph, or the weights beside
    it, cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file = file / IR_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is missing: convert it first.")
    try:
        return ov.Core().read_model(file)
    except RuntimeError:
        raise ValueError(damage_message(file)) from None


def save_ir(model: ov.Model, folder: Path, *, compress_to_fp16: bool = False) -> None:
    """Write an IR and read it back: OpenVINO does not report write errors.

    Raises OSError (ENOSPC) where not all of it was written.
    """
    try:
        ov.save_model(model, folder / IR_NAME, compress_to_fp16=compress_to_fp16)
        ov.Core().read_model(folder / IR_NAME)  # maps the weights, and fails where some are missing
    except RuntimeError:
        raise OSError(errno.ENOSPC, "is the disk full?", str(folder)) from None


def damage_message(file: Path) -> str:
    """What is wrong with a file in `folder/component/`, and the remedy."""
    folder = file.resolve().parents[1]
    return (
        f"{str(file)!r} is damaged: run the same convert_pipeline or optimize_pipeline call for "
        f"{str(folder)!r} again; it makes this component again and keeps the others."
    )


def ir_files(folder: Path) -> list[Path]:
    """The graph and the weights of the IR in a folder, as far as they are there."""
    return sorted(folder.glob("openvino_model.*"))


LARGE_BYTES = 2_000_000_000


def is_large(folder: Path) -> bool:
    """Whether a laptop cannot run this component in 16 bits; of PixArt's, only T5-XXL is."""
    return (folder / IR_NAME).with_suffix(".bin").stat().st_size > LARGE_BYTES


# ---- graphs -------------------------------------------------------------------------------------


def constants(model: ov.Model) -> list[np.ndarray]:
    """The graph's constants as NumPy views (no copy)."""
    return [op.data for op in model.get_ops() if op.get_type_name() == "Constant"]


def is_quantized(model: ov.Model) -> bool:
    """Whether a matrix is stored in 8 bits or fewer, or an activation is quantized."""
    small = {ov.Type.i8, ov.Type.u8, ov.Type.i4, ov.Type.u4, ov.Type.nf4, ov.Type.f8e4m3}

    def is_small_matrix(op: Any) -> bool:
        is_constant = op.get_type_name() == "Constant"
        return is_constant and op.get_element_type() in small and len(op.shape) > 1

    ops = model.get_ops()
    return any(op.get_type_name() == "FakeQuantize" or is_small_matrix(op) for op in ops)


def reshape_inputs(model: ov.Model, **inputs: dict[int, int]) -> None:
    """Set dimensions of a model's inputs: `{axis: length}` per input name, -1 for any length."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        for axis, length in inputs[port.get_any_name()].items():
            shape[axis] = length
        shapes[port] = shape
    model.reshape(shapes)


def static_length(dimension: ov.Dimension) -> int:
    """The length of a dimension, -1 if it is dynamic."""
    return -1 if dimension.is_dynamic else dimension.get_length()


# ---- stored options -----------------------------------------------------------------------------

# Options that OpenVINO should compile a model with are stored in the IR, in the section that
# OpenVINO reads by itself, so that they come along however a model is loaded, copied or saved.
# OpenVINO ignores the inference precision there, so `compile_config` passes both options on.
STORED_OPTIONS = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


def store_runtime_options(model: ov.Model, **options: str | int) -> None:
    """Write compile options into an IR, as in `store_runtime_options(model, X="f32")`.

    Raises ValueError for an option that is not in STORED_OPTIONS.
    """
    for name, value in options.items():
        if name not in STORED_OPTIONS:
            raise ValueError(f"{name}={value!r} cannot be stored: use {STORED_OPTIONS}.")
        model.set_rt_info(str(value), ["runtime_options", name])


def stored_runtime_options(model: ov.Model) -> dict[str, str]:
    """Read what `store_runtime_options` has written."""
    paths = {name: ["runtime_options", name] for name in STORED_OPTIONS}
    return {
        name: str(model.get_rt_info(path).value)
        for name, path in paths.items()
        if model.has_rt_info(path)
    }


def compile_config(model: ov.Model, user: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO's properties for a model: defaults, stored options, then the user's `ov_config`.

    In bf16 and with one thread, OpenVINO 2026.4 divides by zero where it compiles T5, and the
    process ends (its issue 28550: a fused MLP is split between pairs of threads). So T5 has two
    threads at least; where there is one processor, or one for each stream, it runs in f32.
    """
    given = {"PERFORMANCE_HINT": "LATENCY", **stored_runtime_options(model), **user}
    config = {str(name() if callable(name) else name): value for name, value in given.items()}
    is_t5 = "input_ids" in {name for port in model.inputs for name in port.get_names()}
    if is_t5 and _threads_on_cpu(config) == 1:
        two = {**config, "INFERENCE_NUM_THREADS": 2}
        in_f32 = {**config, "INFERENCE_PRECISION_HINT": "f32"}
        return two if _threads_on_cpu(two) == 2 else in_f32
    return config


def _threads_on_cpu(config: dict[str, Any]) -> int:
    """How many threads OpenVINO would give each inference of a model on the CPU."""
    names = ("PERFORMANCE_HINT", "INFERENCE_NUM_THREADS", "NUM_STREAMS")
    asked = {name: config[name] for name in names if name in config}
    compiled = ov.Core().compile_model(_smallest_model(), "CPU", asked)
    threads, streams = map(compiled.get_property, names[1:])
    return max(1, threads // max(1, streams))


# ---- devices and settings -----------------------------------------------------------------------


def device_name(device: str | torch.device) -> str:
    """OpenVINO's name of a device, given by that, as a torch.device or as "cpu:0".

    Raises ValueError unless OpenVINO has it here.
    """
    if isinstance(device, torch.device):
        device = str(device).replace(":", ".")
    check_device(device)
    name = device.upper()
    return "CPU" if name in ("CPU.0", "CPU:0") else name  # there is one, which has no number


def check_device(device: str) -> None:
    """Raise ValueError unless OpenVINO has this device here, also in "HETERO:GPU,CPU"."""
    here = {name.split(".")[0] for name in ov.Core().available_devices}
    several = {"AUTO", "HETERO", "MULTI", "BATCH"}
    first, _, rest = str(device).upper().partition(":")
    names = [first]
    if first in several:  # "-GPU" excludes one, "GPU.1" is the second, "GPU(4)" takes batches of 4
        names = [name for name in rest.replace(" ", "").split(",") if name and name[0] != "-"]
    names = [re.split("[.(]", name)[0] for name in names]
    known = isinstance(device, str) and set(names) <= here
    check(known, "device", device, f"one of {sorted(here)} on this machine, or AUTO")


_CORE_SETTINGS = {"CACHE_DIR", "CACHE_MODE", "ENABLE_MMAP"}  # of OpenVINO itself, on any device


def _smallest_model() -> ov.Model:
    """A model of one operation: shows what OpenVINO makes of its settings."""
    number = opset15.parameter([1], np.float32)
    return ov.Model([opset15.relu(number)], [number], "probe")


def check_ov_config(ov_config: dict[str, Any] | None, device: str) -> None:
    """Raise ValueError for a setting that OpenVINO does not know, or not with this value.

    Each is tried with a model of one operation. AUTO would ignore what it does not know, so names
    that look misspelt are refused first.
    """
    fits = ov_config is None or isinstance(ov_config, dict)
    check(fits, "ov_config", ov_config, "a dictionary of OpenVINO's settings, or None")
    core, probe = ov.Core(), _smallest_model()
    devices = {name.split(".")[0] for name in core.available_devices} | {"AUTO", "HETERO"}
    known = {key for name in devices for key in core.get_property(name, "SUPPORTED_PROPERTIES")}
    known |= _CORE_SETTINGS
    for name, value in (ov_config or {}).items():
        key = str(name() if callable(name) else name)
        if key == "CACHE_DIR":  # the probe would stay there
            continue
        problem = None if key in known else nearest_name(key, known, 0.85)
        if problem:
            problem = f"OpenVINO does not know it, and the nearest is {problem!r}"
        else:
            try:
                core.compile_model(probe, device, {name: value})
            except (RuntimeError, TypeError) as error:
                lines = [line.strip() for line in str(error).splitlines()]
                problem = next(line for line in reversed(lines) if line)
        if problem:
            raise ValueError(
                f"ov_config={{{key!r}: {value!r}}} does not work on {device}: "
                f"{shortened(problem, 200).rstrip('.')}."
            )
