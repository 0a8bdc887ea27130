"""How close a quantized component is to its source, and which of its layers keep it from that."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

Sample = dict[str, np.ndarray]

HELD_OUT = 8  # samples that calibration never sees
_LAYERS = ("MatMul", "Convolution")


def spread(samples: list[Sample], count: int) -> list[Sample]:
    """About `count` of the samples, evenly spread over images and over denoising steps.

    Both matter: ranges that lack the last steps' activations clip them.
    """
    stride = max(1, len(samples) // count)
    while math.gcd(stride, 20) > 1:  # images have 4, 5 or 10 samples: not always the same of them
        stride -= 1
    return samples[::stride][:count]


def hold_out(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples: those to calibrate with, and up to HELD_OUT or a quarter to judge by.

    A single sample serves for both.
    """
    held_out = spread(samples, min(HELD_OUT, max(1, len(samples) // 4)))
    rest = [sample for sample in samples if not any(sample is one for one in held_out)]
    return rest or samples, held_out


class Judge:
    """Measures signal to error of a component's output, in dB, against the component it came from.

    Computed in float32, so that the figure depends little on the processor: 20 dB is an error of a
    tenth of the signal, 40 dB of a hundredth.
    """

    def __init__(self, source: ov.Model, samples: list[Sample]):
        self.samples = samples
        self._references = _run(_compile(source, {}), samples)

    def __call__(self, model: ov.Model, options: dict[str, Any]) -> float:
        """Judge a model that OpenVINO compiles with `options`."""
        return self._compare(_run(_compile(model, options), self.samples))

    def each(self, model: ov.Model, extra: Iterable[Sample]) -> list[float]:
        """Judge a model several times, with each of these inputs beside those of the samples."""
        compiled = _compile(model, {})
        return [
            self._compare(_run(compiled, [{**sample, **more} for sample in self.samples]))
            for more in extra
        ]

    def _compare(self, outputs: list[np.ndarray]) -> float:
        pairs = list(zip(outputs, self._references, strict=True))
        error = sum(float(np.square(output - truth).sum()) for output, truth in pairs)
        signal = sum(float(np.square(truth).sum()) for _, truth in pairs)
        return 10 * math.log10(signal / error) if error else math.inf


def _compile(model: ov.Model, options: dict[str, Any]) -> ov.CompiledModel:
    # OpenVINO's default for integer weights quantizes activations, too: off, unless asked for
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return ov.Core().compile_model(model, "CPU", {**exact, **options})


def _run(compiled: ov.CompiledModel, samples: list[Sample]) -> list[np.ndarray]:
    return [_used(sample, compiled(sample)[0]) for sample in samples]


def _used(sample: Sample, output: np.ndarray) -> np.ndarray:
    """The output; of the DiT's the noise, without the variances, which nothing uses."""
    return output[:, : sample["hidden_states"].shape[1]] if "hidden_states" in sample else output


# ---- layers that err most -----------------------------------------------------------------------


@dataclass(frozen=True)
class RoundedInput:
    """A quantized activation: the layers that read it, and their share of all multiply-adds."""

    name: str  # of the FakeQuantize operation
    layers: tuple[str, ...]
    share: float


def rounded_inputs(model: ov.Model, sample: Sample) -> list[RoundedInput]:
    """The quantized activations in front of layers with weights, in the graph's order."""
    sized = model.clone()
    sized.reshape({name: list(value.shape) for name, value in sample.items()})
    found = {}
    for node in _quantizers(sized):
        layers = [port.get_node() for port in node.output(0).get_target_inputs()]
        layers = [layer for layer in layers if layer.get_type_name() in _LAYERS]
        if layers:
            found[node.get_friendly_name()] = layers
    work = {name: sum(map(_multiply_adds, layers)) for name, layers in found.items()}
    return [
        RoundedInput(
            name,
            tuple(layer.get_friendly_name() for layer in layers),
            work[name] / sum(work.values()),
        )
        for name, layers in found.items()
    ]


def _multiply_adds(layer: ov.Node) -> int:
    """Of a MatMul or Convolution in a graph with static shapes."""
    outputs, weights = math.prod(layer.get_output_shape(0)), layer.input_value(1).get_shape()
    is_convolution = layer.get_type_name() == "Convolution"
    axis = 0 if is_convolution or layer.get_attributes()["transpose_b"] else 1
    return outputs * math.prod(weights) // weights[axis]


def _quantizers(model: ov.Model) -> list[ov.Node]:
    """The FakeQuantize operations; weights are stored as integers and have none."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]


def judge_unrounded(model: ov.Model, names: list[str], judge: Judge) -> list[float]:
    """Signal to error, in dB, with one activation at a time left unrounded.

    One graph serves for all: an additional input says which one.
    """
    switched = model.clone()
    switches = ops.parameter([len(names)], np.float32)
    switches.output(0).get_tensor().set_names({"floating"})
    switched.add_parameters([switches])
    nodes = {node.get_friendly_name(): node for node in _quantizers(switched)}
    for i, name in enumerate(names):
        node, targets = nodes[name], nodes[name].output(0).get_target_inputs()
        switch = ops.gather(switches, np.int64(i), np.int64(0))
        removed = ops.multiply(ops.subtract(node.input_value(0), node), switch)
        mixed = ops.add(node, removed)
        for port in targets:
            port.replace_source_output(mixed.output(0))
    return judge.each(switched, [{"floating": row} for row in np.eye(len(names), dtype=np.float32)])


def leave_floating(model: ov.Model, names: set[str]) -> None:
    """Take FakeQuantize operations out of a graph; their layers keep 8-bit weights."""
    for node in _quantizers(model):
        if node.get_friendly_name() in names:
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(node.input_value(0))
