"""Weight compression with NNCF, for conversion and presets alike."""

import re
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as ops

_INT4_GROUP_SIZES = (128, 64, 32, 16)
_WEIGHTED = (r"/(MatMul|Convolution|Gather)(_\d+)?$",)  # operations that NNCF may find weights in


def matching_layers(model: ov.Model, patterns: tuple[str, ...]) -> set[str]:
    """Names of the operations that match one of the regular expressions."""
    names = (op.get_friendly_name() for op in model.get_ops() if op.get_type_name() != "Constant")
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def weighted_layers(model: ov.Model) -> set[str]:
    """Names of the operations that may have weights."""
    return matching_layers(model, _WEIGHTED)


def ignored_scope(names: set[str]) -> nncf.IgnoredScope:
    """The layers that NNCF leaves alone."""
    return nncf.IgnoredScope(names=sorted(names), validate=False)


def equalize_columns(model: ov.Model) -> None:
    """Bring the columns of each MatMul's weights to about one size, without changing its output.

    Rounding gives each row of a matrix one scale (in 4 bits, each group in a row), so that a column
    of small weights, which a channel of large activations compensates, is lost. Such a column is
    multiplied by a power of two and its channel divided by it, as cross-layer equalization does
    (Nagel et al. 2019). Layers that read the same activations share the factors. Columns within a
    factor of 2 of the rest are left alone, and a layer where all are.
    """
    groups: dict[tuple[str, int], list[tuple[ov.Node, ov.Node]]] = {}
    for layer in model.get_ordered_ops():
        if layer.get_type_name() == "MatMul" and (weights := _stored_weights(layer)):
            source = layer.input_value(0)
            key = (source.get_node().get_friendly_name(), source.get_index())
            groups.setdefault(key, []).append((layer, weights))
    for layers in groups.values():
        powers = [_column_powers(weights.data) for _, weights in layers]
        exponents = -0.5 * np.log2(np.mean(powers, axis=0))
        factors = np.exp2(np.where(abs(exponents) < 1, 0, np.round(exponents)), dtype=np.float32)
        if (factors == 1).all():
            continue
        activations = ops.multiply(layers[0][0].input_value(0), 1 / factors)
        for layer, weights in layers:
            scaled = ops.constant((weights.data * factors).astype(weights.data.dtype))
            scaled.set_friendly_name(weights.get_friendly_name())
            layer.input(0).replace_source_output(activations.output(0))
            (port,) = weights.output(0).get_target_inputs()
            port.replace_source_output(scaled.output(0))


def _stored_weights(layer: ov.Node) -> ov.Node | None:
    """The Constant, `(rows, columns)`, behind a MatMul's second input, unless others read it."""
    port = layer.input_value(1)
    while len(port.get_target_inputs()) == 1 and port.get_node().get_type_name() == "Convert":
        port = port.get_node().input_value(0)
    is_own = len(port.get_target_inputs()) == 1 and port.get_node().get_type_name() == "Constant"
    is_matrix = is_own and len(port.get_shape()) == 2 and layer.get_attributes()["transpose_b"]
    return port.get_node() if is_matrix else None


def _column_powers(weights: np.ndarray) -> np.ndarray:
    """Mean square of each column, where every row has a mean square of 1; 1 for empty columns."""
    squares = np.square(weights.astype(np.float32))
    rows = squares.mean(axis=1, keepdims=True)
    powers = (squares / np.where(rows > 0, rows, 1)).mean(axis=0)
    return np.where(powers > 0, powers, 1)


def compress_to_8_bits(model: ov.Model, ignored: set[str]) -> ov.Model:
    """Store weights as 8-bit integers with one scale per output channel; 4-bit ones stay."""
    return nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=ignored_scope(ignored)
    )


def compress_to_4_bits(
    model: ov.Model,
    group_size: int,
    ignored: set[str],
    dataset: nncf.Dataset | None = None,
    *,
    scale_estimation: bool = False,
    gptq: bool = False,
    others_in_8_bits: bool = False,
) -> ov.Model:
    """Store weights as 4-bit integers with one scale per group.

    Matrices that do not divide into groups, embeddings and the last layer are left as they are, or
    get 8 bits in the same pass: that takes less memory than a second pass. `dataset`: calibration
    data for `scale_estimation` and `gptq`, NNCF's ways to fit the weights.
    """
    backup = nncf.BackupMode.INT8_ASYM if others_in_8_bits else nncf.BackupMode.NONE
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        group_size=group_size,
        backup_mode=backup,
        ignored_scope=ignored_scope(ignored),
        dataset=dataset,
        scale_estimation=scale_estimation or None,
        gptq=gptq or None,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
        ),
    )


def int4_group_size(config: dict[str, Any]) -> int:
    """The largest usual group that divides the component's width (T5-XXL: 4096, DiT XL: 1152)."""
    if "d_model" in config:
        width = config["d_model"]
    elif "num_attention_heads" in config:
        width = config["num_attention_heads"] * config["attention_head_dim"]
    else:
        width = config["block_out_channels"][-1]
    return next((size for size in _INT4_GROUP_SIZES if width % size == 0), _INT4_GROUP_SIZES[-1])
