"""Optimised folders of a random checkpoint: the call, and a small image of theirs."""

from pathlib import Path
from typing import Any

import numpy as np

from ov_pixart_helper import OVPixArtAlphaPipeline
from tests.support.parity import generate

PROMPTS = ["a small red circle", "a large blue star above the sea", "a green square on the hill"]
DATA = {"calibration_prompts": PROMPTS, "num_samples": 10, "progress": False}


def generate_small(folder: Path, loader: Any = OVPixArtAlphaPipeline) -> np.ndarray:
    """An image of two steps, `(64, 96, 3)`, in the precision that the folder asks for."""
    pipeline = loader.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return generate(pipeline, seed=3, prompt=PROMPTS[0], width=96, num_inference_steps=2)[0]
