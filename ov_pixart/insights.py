"""A look inside a pipeline at work: denoising as a film strip, and where each word goes."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch
from PIL import Image

from ov_pixart.checks import check, is_count
from ov_pixart.pipeline import OVPixArtPipeline

# ---- denoising ----------------------------------------------------------------------------------


def film_strip(
    pipeline: OVPixArtPipeline, prompt: str, steps: list[int], **call: Any
) -> dict[str, Image.Image]:
    """The clean image that the DiT predicts at some of the steps, counted from 1.

    `call`: further arguments of the pipeline's call. Raises ValueError for a step that is never
    taken, and for schedulers that keep samples on another scale, such as Euler.
    """
    predicted = _record_predictions(pipeline, prompt, **call)
    images = {}
    for step in steps:
        rule = f"a whole number from 1 to {len(predicted)}"
        check(is_count(step) and step <= len(predicted), "steps", step, rule)
        decoded = pipeline.vae.decode(predicted[step - 1] / pipeline.vae.config.scaling_factor)
        images[f"step {step}"] = pipeline.image_processor.postprocess(decoded[0])[0]
    return images


def _record_predictions(pipeline: OVPixArtPipeline, prompt: str, **call: Any) -> list[torch.Tensor]:
    """Clean latents, `(1, 4, h, w)`, as predicted at each step.

    Source: Salimans & Ho 2022, appendix D, for the three kinds of prediction.
    """
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step
    usual = hasattr(scheduler, "alphas_cumprod") and float(scheduler.init_noise_sigma) == 1
    rule = "one with `alphas_cumprod` and noise of variance 1, such as DPM-Solver++"
    check(usual, "scheduler", type(scheduler).__name__, rule)
    predicted = []

    @functools.wraps(step)  # the pipeline reads the signature
    def recorded(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args, **kwargs):
        alpha = scheduler.alphas_cumprod[int(timestep)]
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        predicted.append(
            {
                "epsilon": (sample - noise * output) / signal,
                "v_prediction": signal * sample - noise * output,
                "sample": output,
            }[scheduler.config.prediction_type]
        )
        return step(output, timestep, sample, *args, **kwargs)

    scheduler.step = recorded
    try:
        pipeline(prompt, output_type="latent", **call)
    finally:
        del scheduler.step
    return predicted


# ---- where each word goes -----------------------------------------------------------------------


@dataclass(frozen=True)
class WordMaps:
    """An image and, for each word of its prompt, how much each place attends to it.

    `maps`: word → `(rows, columns)`, one number per token of the DiT, 1 on average. A word that
    occurs twice has its number behind it.
    """

    image: Image.Image
    maps: dict[str, np.ndarray]

    def peak(self, word: str) -> tuple[float, float]:
        """Where a word's map is strongest: (x, y) in pixels of the image."""
        values = self.maps[word]
        row, column = np.unravel_index(values.argmax(), values.shape)
        x = (column + 0.5) * self.image.width / values.shape[1]
        return float(x), float((row + 0.5) * self.image.height / values.shape[0])


def word_maps(pipeline: OVPixArtPipeline, prompt: str, **call: Any) -> WordMaps:
    """Generate an image and read from the DiT's cross-attention where each word goes.

    The IR is not changed: a copy of the graph gets the queries and keys of its cross-attention as
    outputs, and is run again on every third call of the DiT; its weights are in memory once more.
    `call`: further arguments of the pipeline's call. Raises ValueError for more than one image.
    """
    count = call.get("num_images_per_prompt", 1)
    single = isinstance(prompt, str) and count == 1
    check(single, "num_images_per_prompt", count, "1, with a single prompt")
    image, inputs = record_inputs(pipeline, prompt, **call)
    transformer = pipeline.transformer
    compiled = _with_cross_attention(transformer.model, transformer.ov_config)
    maps = sum(_attention(compiled, arrays) for arrays in inputs[::3])  # (N, L)
    patch = transformer.config.patch_size
    rows, columns = (side // patch for side in inputs[0]["hidden_states"].shape[2:])
    maps = maps.T.reshape(-1, rows, columns)
    maps = maps / maps.mean(axis=(1, 2), keepdims=True)
    seen = {  # a long prompt ends before its last words
        word: [token for token in tokens if token < len(maps)]
        for word, tokens in _words(pipeline, prompt).items()
    }
    return WordMaps(image, {w: maps[tokens].mean(axis=0) for w, tokens in seen.items() if tokens})


def record_inputs(
    pipeline: OVPixArtPipeline, prompt: str, **call: Any
) -> tuple[Image.Image, list[dict[str, np.ndarray]]]:
    """Generate an image; return it and the inputs of every call of the DiT, by name."""
    with pipeline.transformer.recorded_calls() as calls:
        return pipeline(prompt, **call).images[0], calls


def _with_cross_attention(model: ov.Model, config: dict[str, Any]) -> ov.CompiledModel:
    """A copy of the DiT with queries and keys of its cross-attention as outputs.

    From a quarter to half of the blocks, where words and places meet.
    """
    model = model.clone()
    attentions = [
        op
        for op in model.get_ordered_ops()
        if op.get_type_name() == "ScaledDotProductAttention" and ".attn2" in op.get_friendly_name()
    ]
    for op in attentions[len(attentions) // 4 : len(attentions) // 2 + 1]:
        model.add_outputs([op.input_value(0), op.input_value(1)])
    return ov.compile_model(model, "CPU", config)


def _attention(compiled: ov.CompiledModel, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Attention of the conditional half, `(N, L)`: mean over heads and blocks."""
    outputs = list(compiled(arrays).values())[1:]
    mask = torch.as_tensor(arrays["encoder_attention_mask"][-1]) > 0
    total = 0
    for query, key in zip(outputs[::2], outputs[1::2], strict=True):  # (B, heads, N or L, d)
        query, key = torch.from_numpy(query[-1]), torch.from_numpy(key[-1])
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        total = total + scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(0)
    return total.numpy()


def _words(pipeline: OVPixArtPipeline, prompt: str) -> dict[str, list[int]]:
    """Word → its tokens in the prompt; sentencepiece marks the start of a word by "▁"."""
    (text,) = pipeline._text_preprocessing(prompt, clean_caption=False)
    words: list[tuple[str, list[int]]] = []
    for i, piece in enumerate(pipeline.tokenizer.tokenize(text)):
        if piece.startswith("▁") or not words:
            words.append(("", []))
        word, tokens = words[-1]
        words[-1] = (word + piece.lstrip("▁"), [*tokens, i])
    named: dict[str, list[int]] = {}
    for word, tokens in (pair for pair in words if pair[0]):
        word = word.strip(".,;:!?") or word
        count = sum(name.split()[0] == word for name in named) + 1
        named[word if count == 1 else f"{word} {count}"] = tokens
    return named


# ---- what quantization sees ---------------------------------------------------------------------


def layer_weights(model: ov.Model, layer: str) -> np.ndarray:
    """The weights of the first MatMul whose name contains `layer`, `(outputs, inputs)` float32.

    Raises ValueError where there is none, or where it is not stored in floating point.
    """
    node = _matmul(model, layer).input_value(1).get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    is_floating = node.get_element_type() in (ov.Type.f16, ov.Type.bf16, ov.Type.f32)
    check(is_floating, "layer", layer, "one with weights in floating point")
    return node.get_data(dtype=np.float32)


def layer_input(model: ov.Model, layer: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The activation that enters a layer when `model` runs on `inputs`, `(rows, channels)`.

    Raises ValueError for an unknown layer.
    """
    model = model.clone()
    model.add_outputs([_matmul(model, layer).input_value(0)])
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = list(compiled(inputs).values())[-1]
    return values.reshape(-1, values.shape[-1])


def calibrated_range(model: ov.Model, layer: str) -> tuple[float, float]:
    """The range that calibration found for the activation entering a layer of a quantized model.

    Raises ValueError where the layer keeps floating activations, or is unknown.
    """
    node = _matmul(model, layer).input_value(0).get_node()
    quantized = node.get_type_name() == "FakeQuantize"
    check(quantized, "layer", layer, "one that computes in integers")
    low, high = (node.input_value(i).get_node().get_data(dtype=np.float32) for i in (1, 2))
    return float(low.min()), float(high.max())


def _matmul(model: ov.Model, layer: str) -> ov.Node:
    for op in model.get_ordered_ops():
        if op.get_type_name() == "MatMul" and layer in op.get_friendly_name():
            return op
    raise ValueError(f"layer={layer!r} is not part of a MatMul's name in this model.")
