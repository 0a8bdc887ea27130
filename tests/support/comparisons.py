"""A comparison of two pipelines with known answers, made without generating anything."""

import numpy as np
from PIL import Image

from ov_pixart.compare import Comparison, ImageRun, evaluate


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (32, 16), (level, level, level))


def image_run(level: int, total_s: float, memory: float) -> ImageRun:
    """A run of two steps, 0.1 and 0.3 s, and a third of 0.2 s."""
    return ImageRun(
        image=gray(level),
        total_s=total_s,
        text_encoder_s=0.05,
        step_s=[0.1, 0.3, 0.2],
        vae_decoder_s=0.5,
        peak_memory_mb=memory,
    )


def known_comparison() -> Comparison:
    """Three images each; "b" is off by 1, 2 and 0 levels of gray. The score is the brightness."""
    runs = {
        "a": [image_run(100, 1.0, 500), image_run(100, 2.0, 600), image_run(100, 9.0, 550)],
        "b": [image_run(101, 3.0, 700), image_run(102, 4.0, 700), image_run(100, 5.0, 700)],
    }
    sizes = {
        "a": {"text_encoder": 1.0, "transformer": 2.0, "vae_decoder": 3.0},
        "b": {"text_encoder": 0.5, "transformer": 1.0, "vae_decoder": 1.5},
    }
    pairs = [("red", 1), ("green", 2), ("blue", 3)]

    def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
        assert prompts == ["red", "green", "blue"]
        return [float(np.asarray(image).mean()) for image in images]

    return evaluate(runs, sizes, pairs, "a", brightness)
