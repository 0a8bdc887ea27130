"""Weight compression: which layers are chosen, and the size of 4-bit groups."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ov_pixart.compress import (
    compress_to_4_bits,
    compress_to_8_bits,
    int4_group_size,
    matching_layers,
    weighted_layers,
)
from ov_pixart.quiet import silent_nncf


@pytest.fixture
def model() -> ov.Model:
    """Two products, 64 → 64 → 64, and an output layer."""
    x = ops.parameter([-1, 64], np.float32, name="x")
    random, product = np.random.default_rng(0), x
    for name in ("block.first", "block.second", "head"):
        weights = ops.constant(random.standard_normal((64, 64), np.float32))
        product = ops.matmul(product, weights, False, True)
        product.set_friendly_name(f"{name}/MatMul")
    return ov.Model([product], [x])


def stored_types(model: ov.Model) -> list[str]:
    """Types of the matrices, in the order of the layers."""
    found = {}
    for op in model.get_ops():
        if op.get_type_name() == "MatMul":
            node = op.input_value(1).get_node()
            while node.get_type_name() != "Constant":
                node = node.input_value(0).get_node()
            found[op.get_friendly_name()] = node.get_element_type().get_type_name()
    return [found[f"{name}/MatMul"] for name in ("block.first", "block.second", "head")]


def test_layers_are_found_by_expressions_on_their_names(model):
    assert matching_layers(model, (r"second/", r"^head")) == {"block.second/MatMul", "head/MatMul"}
    assert matching_layers(model, ()) == set()
    assert len(weighted_layers(model)) == 3


def test_ignored_layers_stay_floating(model):
    with silent_nncf():
        compressed = compress_to_8_bits(model, {"block.second/MatMul"})
    assert stored_types(compressed) == ["u8", "f32", "u8"]


def test_8_bits_leave_4_bit_weights_alone(model):
    with silent_nncf():
        compressed = compress_to_4_bits(model, 32, {"head/MatMul"})
        compressed = compress_to_8_bits(compressed, set())
    assert stored_types(compressed) == ["i4", "i4", "u8"]


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"d_model": 4096}, 128),
        ({"num_attention_heads": 16, "attention_head_dim": 72}, 128),
        ({"num_attention_heads": 4, "attention_head_dim": 12}, 16),
        ({"block_out_channels": [8, 96]}, 32),
        ({"d_model": 30}, 16),  # some layers may fit
    ],
)
def test_groups_divide_the_width(config, size):
    assert int4_group_size(config) == size
