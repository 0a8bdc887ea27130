"""Where the time of one step goes, layer by layer, and how far that is from the machine's best."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import nncf
import numpy as np
import openvino as ov

from benchmarks.cases import Case, Scale
from benchmarks.engines import OneModel
from ov_pixart.loading import load_pipeline
from ov_pixart.quiet import silent_nncf

_COUNTERS = {"PERF_COUNT": "YES"}
_RUNS = 5
# Layer types of matrix products in OpenVINO
_PRODUCTS = (
    "FullyConnected",
    "FullyConnectedCompressed",
    "FullyConnectedQuantized",
    "FullyConnectedQuantizedLegacy",
    "MatMul",
)
_ATTENTION = "ScaledDotProductAttention"
# These depend on the prompt alone, and could be computed per image instead of per step
_TEXT_SIDE = (".caption_projection.", ".attn2.to_k/", ".attn2.to_v/")
_GEMMS = ((1024, 1152, 4608), (1024, 4608, 1152))  # rows × inner × columns, the DiT's largest


def profile_step(case: Case, engine: str, folder: Path, scale: Scale) -> dict[str, Any]:
    """Run one step of the DiT with OpenVINO's counters on, then matrix products alone.

    Returns seconds and shares by layer type and by primitive (the kernel that OpenVINO chose, and
    its precision), the share of layers that depend on the prompt alone, and the rate of the matrix
    products beside this machine's best.
    """
    transformer = load_pipeline(folder, compile=False).transformer
    inputs = OneModel(transformer, case, engine, scale).inputs(0)
    transformer.ov_config.update(_COUNTERS)
    arrays = _record_inputs(transformer, inputs)
    infos = _median_run(transformer.request, arrays)
    total = sum(one.seconds for one in infos)
    flops = _flops(transformer.model, arrays)
    products = sum(one.seconds for one in infos if one.kind in _PRODUCTS)
    attention = sum(one.seconds for one in infos if one.kind.startswith("attention"))
    text = sum(one.seconds for one in infos if any(part in one.name for part in _TEXT_SIDE))
    peaks = gemm_peaks(shrink=scale.shrink)
    rate = flops["MatMul"] / products / 1e9 if products else 0.0
    best = peaks["int8"] if "int8" in engine or "int4" in engine else peaks["float"]
    return {
        "case": case.name,
        "engine": engine,
        "seconds": total,
        "by_type": _summary((one.kind, one.seconds) for one in infos),
        "by_primitive": _summary((f"{one.kind}: {one.primitive}", one.seconds) for one in infos),
        "text_side": {"seconds": text, "share": text / total},
        "matmul": {
            "gflop": flops["MatMul"] / 1e9,
            "seconds": products,
            "gflop_per_s": rate,
            "share_of_peak": rate / best if best else 0.0,
        },
        "attention": {
            "gflop": flops[_ATTENTION] / 1e9,
            "seconds": attention,
            "gflop_per_s": flops[_ATTENTION] / attention / 1e9 if attention else 0,
        },
        "peak_gflop_per_s": peaks,
    }


def _record_inputs(transformer: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that one call passes to OpenVINO; compiles the model on the way."""
    recorded = {}

    def record(given: dict[str, Any]) -> np.ndarray:
        for port in transformer.model.inputs:
            name = port.get_any_name()
            dtype = np.int64 if port.get_element_type() == ov.Type.i64 else np.float32
            recorded[name] = np.ascontiguousarray(given[name].numpy().astype(dtype))
        return np.zeros(1, np.float32)

    transformer.infer = record
    transformer(**inputs, return_dict=False)
    del transformer.infer
    return recorded


class _Layer(NamedTuple):
    """A layer that ran: its name in the IR, its type, its kernel, and its seconds."""

    name: str
    kind: str
    primitive: str
    seconds: float


def _median_run(compiled: ov.CompiledModel, arrays: dict[str, np.ndarray]) -> list[_Layer]:
    """The layers of the run of median length."""
    request = compiled.create_infer_request()
    runs = []
    for _ in range(1 + _RUNS):
        request.infer(arrays)
        infos = [
            _Layer(info.node_name, _kind(info), info.exec_type, info.real_time.total_seconds())
            for info in request.profiling_info
            if info.status == ov.ProfilingInfo.Status.EXECUTED
        ]
        runs.append(infos)
    runs = sorted(runs[1:], key=lambda infos: sum(one.seconds for one in infos))
    return runs[len(runs) // 2]


def _kind(info: ov.ProfilingInfo) -> str:
    """The layer's type; attention is marked, which OpenVINO fuses into types of many uses."""
    of_attention = _ATTENTION in info.node_name
    if of_attention and info.node_type in ("Subgraph", "MatMul", "Softmax", _ATTENTION):
        return f"attention ({info.node_type})"
    return info.node_type


def _summary(pairs: Any) -> list[dict[str, Any]]:
    """Count, seconds and share of each name, the slowest first."""
    seconds, counts = defaultdict(float), defaultdict(int)
    for name, value in pairs:
        seconds[name] += value
        counts[name] += 1
    total = sum(seconds.values()) or 1.0
    return [
        {"name": name, "layers": counts[name], "seconds": value, "share": value / total}
        for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])
    ]


def _flops(model: ov.Model, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Multiplications and additions of matrix products and of attention, from their shapes."""
    fixed = model.clone()
    fixed.reshape({name: list(array.shape) for name, array in arrays.items()})
    flops = {"MatMul": 0.0, _ATTENTION: 0.0}
    for op in fixed.get_ops():
        kind = op.get_type_name()
        if kind == "MatMul":
            left = list(op.input_value(0).get_shape())
            inner = left[-2] if op.get_attributes()["transpose_a"] else left[-1]
            flops[kind] += 2.0 * np.prod(list(op.output(0).get_shape())) * inner
        elif kind == _ATTENTION:
            query, key = (list(op.input_value(i).get_shape()) for i in (0, 1))
            flops[kind] += 4.0 * np.prod(query) * key[-2]  # Q·Kᵀ, then its product with V
    return flops


def gemm_peaks(shrink: int = 1) -> dict[str, float]:
    """10⁹ operations per second of one matrix product: in int8, and in floating point."""
    peaks = {"int8": 0.0, "float": 0.0}
    for rows, inner, columns in _GEMMS:
        shape = (rows // shrink, inner // shrink)
        x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for name, quantized in (("int8", True), ("float", False)):
            model = _gemm(x, columns // shrink, quantized)
            compiled = ov.Core().compile_model(
                model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **_COUNTERS}
            )
            infos = _median_run(compiled, {"x": x})
            seconds = sum(one.seconds for one in infos if one.kind in _PRODUCTS)
            if seconds:
                rate = 2e-9 * x.size * (columns // shrink) / seconds
                peaks[name] = max(peaks[name], rate)
    return peaks


def _gemm(x: np.ndarray, columns: int, quantized: bool) -> ov.Model:
    """One matrix product with constant weights, quantized as the presets do it."""
    weights = np.random.default_rng(1).standard_normal((columns, x.shape[1]), dtype=np.float32)
    given = ov.opset13.parameter(list(x.shape), ov.Type.f32, name="x")
    given.output(0).get_tensor().set_names({"x"})
    product = ov.opset13.matmul(given, weights, False, True)
    model = ov.Model([ov.opset13.result(product)], [given], "gemm")
    if not quantized:
        return model
    with silent_nncf():
        return nncf.quantize(
            model,
            nncf.Dataset([{"x": x}]),
            subset_size=1,
            model_type=nncf.ModelType.TRANSFORMER,
        )
