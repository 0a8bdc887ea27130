"""A stand-in for a converted PixArt pipeline: the same call, a thousand times faster.

It denoises nothing: latents walk from seeded noise to a flat colour that the prompt's hash picks,
at a pace the test sets. What the demo relies on is real: `__call__`'s arguments, the callback, the
scheduler's attributes, the tokenizer, the VAE's `decode`, PIL pictures at the end.
"""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

RGB = torch.tensor(  # (4, 3): what the stand-in's "VAE" makes of its four latent channels
    [[0.5, 0.1, 0.1], [0.1, 0.5, 0.1], [0.1, 0.1, 0.5], [0.2, -0.2, 0.2]]
)


class FakeTokenizer:
    """One token a word, one more at the end; words of other alphabets are unknown to it."""

    unk_token_id = 999

    def __call__(self, text: str, truncation: bool = False, max_length: int = 0) -> Any:
        ids = [1 + len(w) if w.isascii() else self.unk_token_id for w in text.split()] + [0]
        return SimpleNamespace(input_ids=ids[:max_length] if truncation else ids)


class FakePipeline:
    """Paints a colour field; `step_seconds` sets its pace, `fail_on` a prompt it breaks on."""

    step_seconds = 0.0
    fail_on = "please fail"

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tokenizer = FakeTokenizer()
        self.vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=self.decode)
        self.scheduler = SimpleNamespace(
            model_outputs=[None, None], config=SimpleNamespace(algorithm_type="dpmsolver++")
        )

    @staticmethod
    def decode(latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        colours = torch.einsum("bchw,cr->brhw", latents, RGB)
        return (torch.nn.functional.interpolate(colours, scale_factor=8),)

    @staticmethod
    def _text_preprocessing(text: str, clean_caption: bool = False) -> list[str]:
        return [text.lower().strip()]

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str,
        num_inference_steps: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        generator: list[torch.Generator],
        callback: Any,
        **_: Any,
    ) -> Any:
        if prompt == self.fail_on:
            raise RuntimeError("the device is on fire")
        shape = (4, height // 8, width // 8)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generator])
        paint = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        target = torch.randn((1, 4, 1, 1), generator=paint).expand_as(noise)
        for i in range(num_inference_steps):
            time.sleep(self.step_seconds)
            remaining = 1 - (i + 1) / num_inference_steps
            latents = target + remaining * noise
            self.scheduler.model_outputs[-1] = latents
            callback(i, torch.tensor(0), latents)
        pixels = self.decode(latents + 0.02 * noise)[0].permute(0, 2, 3, 1)
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().numpy().astype(np.uint8)
        return SimpleNamespace(images=[Image.fromarray(p) for p in pixels])


def fake_folder(folder: Path, *, few_step: bool = False, vocabulary: int = 200) -> Path:
    """Writes the configuration files of a converted pipeline, without its models."""
    scheduler = "LCMScheduler" if few_step else "DPMSolverMultistepScheduler"
    files = {
        "model_index.json": {"_class_name": "OVPixArtAlphaPipeline"},
        "transformer/config.json": {"sample_size": 32, "in_channels": 4},
        "scheduler/scheduler_config.json": {"_class_name": scheduler},
        "text_encoder/config.json": {"vocab_size": vocabulary},
        "vae_decoder/config.json": {"block_out_channels": [16, 32, 64, 64]},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "transformer" / "openvino_model.xml").touch()
    return folder
