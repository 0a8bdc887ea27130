"""Weight compression with NNCF, for conversion and presets alike."""

import re
from typing import Any

import nncf
import openvino as ov

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
    others_in_8_bits: bool = False,
) -> ov.Model:
    """Store weights as 4-bit integers with one scale per group.

    Matrices that do not divide into groups, embeddings and the last layer are left as they are, or
    get 8 bits in the same pass: that takes less memory than a second pass. `dataset`: calibration
    data that the scales are fitted to.
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
        scale_estimation=dataset is not None,
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
