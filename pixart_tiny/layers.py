"""Which layers suffer from integers? The evidence for the presets' lists of layers.

    python -m pixart_tiny.layers

With one kind of layer at a time left in floating point, how much closer does PixArt-tiny's DiT get
to its own floating-point output, on samples from held-out captions?
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov

import ov_pixart_helper as ovp
from ov_pixart.calibration import CalibrationData, choose_prompts
from ov_pixart.presets import ATTENTION, POSITIONS
from ov_pixart.quantize import apply_recipe
from ov_pixart.quiet import silent_nncf
from ov_pixart_helper import PRESETS, Recipe
from pixart_tiny import evaluate
from pixart_tiny.presets import F32, WORK

LAYERS = {  # left in floating point, one at a time
    "modulation (adaLN) and timestep": r"\.adaln_single\.",
    "patches": r"\.pos_embed\.proj/",
    "caption projection": r"\.caption_projection\.",
    "self-attention q, k, v": r"\.attn1\.to_[qkv]/",
    "self-attention out": r"\.attn1\.to_out",
    "cross-attention q": r"\.attn2\.to_q/",
    "cross-attention k, v": r"\.attn2\.to_[kv]/",
    "cross-attention out": r"\.attn2\.to_out",
    "feed-forward in": r"\.ff\.net\.0\.proj/",
    "feed-forward out (after GELU)": r"\.ff\.net\.2/",
    "output": r"\.proj_out/",
}


def layer_variants() -> Iterator[tuple[str, Recipe]]:
    """Recipes for the DiT to compare, with a name for each."""
    kept = POSITIONS
    everything = Recipe(weights="int8", activations=True, floating=kept)
    yield "everything in integers", everything
    for alpha in (0.15, 0.5):
        yield f"  the same, SmoothQuant {alpha}", replace(everything, smooth_quant=alpha)
    base = replace(everything, floating=(*kept, *ATTENTION))
    yield "everything but attention's inputs", base
    for name, pattern in LAYERS.items():
        yield f"  the same, {name} floating", replace(base, floating=(*base.floating, pattern))
    weights = Recipe(weights="int8", floating=kept)
    yield "8-bit weights", weights
    for size in (32, 128):
        options = (("DYNAMIC_QUANTIZATION_GROUP_SIZE", size),)
        yield f"  the same, dynamic activations by {size}", replace(weights, options=options)
    for name, pattern in LAYERS.items():
        others = tuple(p for p in LAYERS.values() if p != pattern)
        yield f"  {name} in 4 bits", Recipe(weights="int4", sensitive=others, floating=kept)
    for preset in PRESETS:
        yield f"preset {preset}", PRESETS[preset].transformer


GUIDANCE_SCALE = 4.5


def measure_layers(checkpoint: Path, samples: int = 40) -> None:
    """Prints the DiT's signal-to-error ratio, in dB, for every variant."""
    fp16 = ovp.convert_pipeline(checkpoint, WORK / "fp16")
    held_out = [caption for caption, _ in evaluate.read_captions()[: samples // 10]]
    prompts = choose_prompts(None, fp16, samples, seed=0)

    def recorded(captions: list[str], count: int) -> list[dict]:
        data = CalibrationData(fp16, WORK / "calibration", captions, count, len(captions))
        return data.samples("transformer", progress=False)

    calibration, tested = recorded(prompts, samples), recorded(held_out, samples // 2)
    folder = fp16 / "transformer"
    config = ovp.read_json(folder / "config.json")

    def read() -> ov.Model:
        return ov.Core().read_model(folder / "openvino_model.xml")

    truth = guided_outputs(read(), tested)
    print("DiT against itself in floating point, signal to error in dB, higher is better")
    for name, recipe in layer_variants():
        data = calibration if recipe.needs_data else []
        with silent_nncf():
            model = apply_recipe(read(), recipe, config, data)
        error = np.square(guided_outputs(model, tested, dict(recipe.options)) - truth)
        print(
            f"  {name:45} {10 * np.log10(np.square(truth).mean() / error.mean()):6.2f}", flush=True
        )


def guided_outputs(model: ov.Model, samples: list[dict], options: dict | None = None) -> np.ndarray:
    """The guided velocity of each sample, flat, in float32 execution."""
    # Dynamic quantization is OpenVINO's default for integer weights: off, unless asked for.
    config = {**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, **(options or {})}
    compiled = ov.Core().compile_model(model, "CPU", config)
    outputs = [compiled(sample)[0][:, :4] for sample in samples]
    # The sampler uses guided outputs: guidance also amplifies the difference of two errors.
    return np.concatenate([(o[:1] + GUIDANCE_SCALE * (o[1:] - o[:1])).ravel() for o in outputs])


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    measure_layers(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
