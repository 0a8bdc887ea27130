"""Images of PixArt-tiny with any solver, guidance interval or step cache, for solver_study.py.

A *row* is one image's latents passing through the DiT once: a guided step takes two.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as cached

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from pixart_tiny.evaluate import CHECKPOINT
from pixart_tiny.step_caches import Blocks, Cache, Half

SOLVERS = {  # name → scheduler, and what it changes in the checkpoint's configuration
    "sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "ode": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}


@dataclass(frozen=True)
class Variant:
    """One way to generate; guidance runs from `start` to `end`, in shares of the steps."""

    solver: str
    steps: int = 20
    start: float = 0.0
    end: float = 1.0
    scale: float = 4.5
    cache: Cache | None = None

    def is_guided(self, step: int) -> bool:
        """Whether a step, numbered from 0, has guidance."""
        return self.start <= step / self.steps < self.end


class Study:
    """The checkpoint on one device, with the embeddings of all captions.

    `captions`: (caption, seed) pairs; a caption may come several times. `size`: (height, width) of
    the images.
    """

    def __init__(
        self, captions: Sequence[tuple[str, int]], size: tuple[int, int], device: str
    ) -> None:
        pipeline = PixArtAlphaPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32).to(
            device
        )
        self.captions, self.device = [caption for caption, _ in captions], device
        self.seeds = [seed for _, seed in captions]
        self.latents = (len(captions), 4, *(side // pipeline.vae_scale_factor for side in size))
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        with torch.inference_mode():
            found = pipeline.encode_prompt(self.captions, device=device)
        longest = int(found[1].sum(1).max())  # padding changes nothing, and costs
        self.text = {
            "conditional": (found[0][:, :longest], found[1][:, :longest]),
            "unconditional": (found[2][:, :longest], found[3][:, :longest]),
        }
        self.transformer = pipeline.transformer
        self.blocks = Blocks(list(self.transformer.transformer_blocks))
        self.transformer.transformer_blocks = nn.ModuleList([self.blocks])
        self.reference = cached(lambda solver: self.generate(Variant(solver))[0])

    def velocity(self, name: str, half: Half, latents: Tensor, time: Tensor) -> Tensor:
        """The DiT's output for one half, `(B, 4, H, W)`, evaluated or predicted."""
        self.blocks.half = half
        embeddings, mask = self.text[name]

        def evaluated() -> Tensor:
            return self.transformer(
                latents,
                encoder_hidden_states=embeddings,
                encoder_attention_mask=mask,
                timestep=time.expand(len(latents)),
                return_dict=False,
            )[0][:, : latents.shape[1]]

        if half.cache and half.cache.first_block is not None:
            return evaluated()
        rows = half.decide(latents[:, :0], self.blocks.is_last)
        if not half.cache:
            return evaluated()
        if rows.all():
            half.series.update(self.blocks.at, evaluated(), rows)
        return half.series.predict(self.blocks.at)

    @torch.inference_mode()
    def generate(self, variant: Variant) -> tuple[Tensor, float, float]:
        """Images `(B, H, W, 3)` uint8, and the full and the shallow rows per image."""
        kind, changes = SOLVERS[variant.solver]
        scheduler = kind.from_config(self.scheduler.config, **changes)
        scheduler.set_timesteps(variant.steps, device=self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        takes = inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if "generator" in takes else {}
        latents = randn_tensor(self.latents, generators, torch.device(self.device))
        latents = latents * scheduler.init_noise_sigma
        conditional = Half("conditional", variant.cache)
        unconditional = Half("unconditional", variant.cache, leader=conditional)
        for step, time in enumerate(scheduler.timesteps):
            over_log_snr = variant.cache and variant.cache.log_snr
            self.blocks.at = -math.log(scheduler.sigmas[step]) if over_log_snr else float(step)
            self.blocks.is_last = step == variant.steps - 1
            scaled = scheduler.scale_model_input(latents, time)
            output = self.velocity("conditional", conditional, scaled, time)
            if variant.is_guided(step):
                base = self.velocity("unconditional", unconditional, scaled, time)
                output = base + variant.scale * (output - base)
            if variant.cache and variant.cache.first_order and not conditional.rows.all():
                scheduler.lower_order_nums = 0
            latents = scheduler.step(output, time, latents, **options, return_dict=False)[0]
        parts = [self.vae.decode(part).sample for part in latents.split(50)]
        pixels = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
        images = pixels.round().byte().permute(0, 2, 3, 1)
        rows = [getattr(conditional, k) + getattr(unconditional, k) for k in ("full", "shallow")]
        return images, *rows
