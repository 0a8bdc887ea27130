"""IRs, looked into: which layers have integer weights, and which compute in integers."""

from pathlib import Path

import openvino as ov

from ov_pixart.ir import read_ir


def layers(folder: Path, name: str) -> dict[str, tuple[str, bool]]:
    """Name of each operation with weights → (type of the weights, whether its input is rounded)."""
    found = {}
    for op in read_ir(folder / name).get_ops():
        if op.get_type_name() not in ("MatMul", "Convolution", "Gather"):
            continue
        at = 0 if op.get_type_name() == "Gather" else 1
        if (kind := stored_type(op.input_value(at).get_node())) is not None:
            found[op.get_friendly_name()] = (kind, is_rounded(op.input_value(0).get_node()))
    return found


def is_rounded(node: ov.Node) -> bool:
    """Whether an activation comes in integers; operations that only move values are passed."""
    while node.get_type_name() in {"Reshape", "Transpose"}:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize"


def stored_type(node: ov.Node) -> str | None:
    """Follow a weight through its scales to the constant it is stored as, if it is one."""
    passed = {"Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize", "Transpose"}
    while node.get_type_name() in passed:
        node = node.input_value(0).get_node()
    is_matrix = node.get_type_name() == "Constant" and len(node.shape) > 1
    return node.get_element_type().get_type_name() if is_matrix else None


def rounded_inputs(folder: Path, name: str) -> list[str]:
    """Names of the operations that take an activation in 8-bit integers."""
    return [
        port.get_node().get_friendly_name()
        for op in read_ir(folder / name).get_ops()
        if op.get_type_name() == "FakeQuantize"
        and stored_type(op.input_value(0).get_node()) is None
        for port in op.output(0).get_target_inputs()
    ]


def is_in_a_block(name: str) -> bool:
    return "transformer_blocks" in name and "MatMul" in name
