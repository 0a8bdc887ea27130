"""A stand-in for a converted PixArt pipeline: the same call, a thousand times faster.

It denoises nothing: latents walk from seeded noise to a flat colour that the prompt's hash picks.
The demo relies on real parts: `__call__`'s arguments, the callback, the scheduler's attributes,
the tokenizer, the VAE's `decode`, PIL images at the end. Tests decide how far a run may go: `PACE`.
"""

from __future__ import annotations

import json
import threading
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


class Pace:
    """Counts the steps that all stand-ins take, and holds them where a test wants to look."""

    def __init__(self) -> None:
        self.taken = 0
        self._allowed = float("inf")
        self._changed = threading.Condition()

    def hold_after(self, steps: float) -> None:
        """Let `steps` more steps happen; the next one waits."""
        with self._changed:
            self._allowed = self.taken + steps
            self._changed.notify_all()

    def go_on(self) -> None:
        self.hold_after(float("inf"))

    def step(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.taken < self._allowed, timeout=120):
                raise TimeoutError("A test holds this run and never lets it go on.")
            self.taken += 1


PACE = Pace()


class FakeTokenizer:
    """One token per word, one more at the end; words of other alphabets are unknown to it."""

    unk_token_id = 0
    eos = 1

    def __init__(self) -> None:
        self.words = ["<unk>", ""]

    def __call__(self, text: str, truncation: bool = False, max_length: int = 0) -> Any:
        self.words += [w for w in dict.fromkeys(text.split()) if w not in self.words]
        ids = [self.words.index(w) if w.isascii() else self.unk_token_id for w in text.split()]
        return SimpleNamespace(input_ids=[*ids[: max_length - 1], self.eos])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[i] for i in ids)


class FakePipeline:
    """Generates a colour field; breaks on the prompt `fail_on`."""

    fail_on = "please fail"

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tokenizer = FakeTokenizer()
        self.vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=self.decode)
        self.scheduler = SimpleNamespace(
            model_outputs=[None, None], config=SimpleNamespace(algorithm_type="dpmsolver++")
        )

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    @staticmethod
    def decode(latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        colours = torch.einsum("bchw,cr->brhw", latents, RGB)
        return (torch.nn.functional.interpolate(colours, scale_factor=8),)

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
        colour = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        target = torch.randn((1, 4, 1, 1), generator=colour).expand_as(noise)
        for i in range(num_inference_steps):
            PACE.step()
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
