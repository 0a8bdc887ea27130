"""Trains PixArt-tiny from nothing but `scenes.py`, in five stages that follow PixArt's own recipe.

    python -m assets.training.train            # every stage that is not finished yet, in order
    python -m assets.training.train dit-128    # one stage
    python -m assets.training.train --minutes 60   # stop after an hour; the next call goes on

State lives in build/training/ (one folder a stage; outside git). Every step draws its data from
(seed, step), so a run that was stopped and resumed sees what an unbroken one would have seen. The
last stage, `export`, writes assets/pixart-tiny in diffusers layout.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from assets.training import scenes

STATE = Path("build/training")
CHECKPOINT = Path("assets/pixart-tiny")
SEED = 0

# ----------------------------------------------------------------------------------------------
# The three models
# ----------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """8× VAE of 2.6 M parameters; narrow at full resolution, where a CPU spends its time."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,  # latents are whitened when the stage ends, see `whiten_latents`
        force_upcast=False,
    )


# ----------------------------------------------------------------------------------------------
# Resumable stages
# ----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A stage's position: `step` of `steps`, with everything needed to go on after a stop."""

    name: str
    steps: int
    deadline: float
    step: int = 0

    @property
    def folder(self) -> Path:
        return STATE / self.name

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").is_file()

    def resume(self, **parts) -> None:
        """Restores model, optimizer and EMA if an earlier segment left them."""
        file = self.folder / "state.pt"
        if file.is_file():
            state = torch.load(file, weights_only=True)
            self.step = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def save(self, **parts) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")

    def finish(self, **figures) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "finished.json").write_text(json.dumps(figures, indent=1) + "\n")

    def loop(self, save: Callable[[], None], every: int = 500) -> Iterator[tuple[int, float]]:
        """Yields (step, share of the stage done) until the stage or this segment's time ends."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10)
        with bar:
            while self.step < self.steps and time.monotonic() < self.deadline:
                yield self.step, self.step / self.steps
                self.step += 1
                bar.update()
                if self.step % every == 0:
                    save()
        save()


def warmup_cosine(done: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Learning-rate factor: a short linear warm-up, then half a cosine down to `floor`."""
    if done < warmup:
        return done / warmup + 1e-3
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


def to_tensor(pictures: np.ndarray | list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (N, H, W, 3) as (N, 3, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1)


# ----------------------------------------------------------------------------------------------
# Stage: VAE
# ----------------------------------------------------------------------------------------------

POSTERIOR_STD = 0.1  # noise on unit-variance latents: what the decoder learns to shrug off
VAE_SIZES = ((128, 128, 4), (256, 256, 1), (192, 336, 1), (336, 192, 1))  # height, width, batch


def vae_batch(step: int, pool: dict) -> torch.Tensor:
    """Equal numbers of pixels each step: small scenes, whole pictures, or crops around things."""
    rng = np.random.default_rng((SEED, 1, step))
    kind = rng.random()
    if kind < 0.4:  # four 128² crops at native scale, where the edges are
        pictures = [pool[256, 256][i] for i in rng.integers(len(pool[256, 256]), size=4)]
        corners = rng.integers(16, 113, size=(4, 2))
        return to_tensor([p[y : y + 128, x : x + 128] for p, (y, x) in zip(pictures, corners)])
    height, width, batch = VAE_SIZES[0 if kind < 0.7 else rng.choice([1, 1, 2, 3])]
    group = pool[height, width]
    return to_tensor([group[i] for i in rng.integers(len(group), size=batch)])


def render_pool(sizes: dict[tuple[int, int], int]) -> dict[tuple[int, int], list[np.ndarray]]:
    """Renders `count` training scenes for each (height, width)."""
    rng = np.random.default_rng((SEED, 2))
    return {
        (h, w): [scenes.render(scenes.sample_training_scene(rng), h, w, rng) for _ in range(count)]
        for (h, w), count in sizes.items()
    }


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2 with extra weight on edges, where an 8× VAE blurs first."""
    dx = F.pad((target[..., 1:] - target[..., :-1]).abs().amax(1, keepdim=True), (0, 1))
    dy = F.pad((target[..., 1:, :] - target[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 0, 1))
    weight = 1 + 4 * F.max_pool2d(torch.maximum(dx, dy), 5, 1, 2).clamp(max=1)
    error = output - target
    return (weight * (error.abs() + 2 * error.square())).mean()


def train_vae(run: Run) -> None:
    """Trains the VAE with fixed posterior noise on latents held at zero mean and unit variance."""
    torch.manual_seed(SEED)
    vae = make_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(vae.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    parts = {"model": vae, "optimizer": optimizer, "ema": ema}
    run.resume(**parts)
    pool = render_pool({(128, 128): 4000, (256, 256): 2500, (192, 336): 400, (336, 192): 400})
    for step, done in run.loop(lambda: run.save(**parts)):
        set_learning_rate(optimizer, warmup_cosine(done))
        pictures = vae_batch(step, pool).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.quant_conv(vae.encoder(pictures))[:, :4].float()
            noise = POSTERIOR_STD * 2 * torch.rand(len(mean), 1, 1, 1) * torch.randn_like(mean)
            output = vae.decoder(vae.post_quant_conv(mean + noise)).float()
        loss = reconstruction_loss(output, pictures)
        channel_mean, channel_std = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
        loss = loss + 0.02 * (channel_mean.square() + (channel_std - 1).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.step(vae.parameters())
        if step % 100 == 0:
            tqdm.write(f"vae step {step} loss {loss.item():.4f}")
    if run.step == run.steps:
        ema.copy_to(vae.parameters())
        whiten_latents(vae, pool[256, 256][:400])
        vae.save_pretrained(run.folder / "vae")
        run.finish(psnr_db=round(vae_psnr(vae), 2))


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pictures: list[np.ndarray]) -> None:
    """Gives the latents zero mean and identity covariance, exactly, without changing a picture.

    PixArt's pipeline knows one scaling factor for all channels, so channels of unequal strength
    would be noised unequally. Both 1×1 convolutions around the latents are linear: the whitening
    goes into `quant_conv` and its inverse into `post_quant_conv`.
    """
    latents = torch.cat([encode(vae, to_tensor([p])) for p in pictures])
    flat = latents.permute(1, 0, 2, 3).flatten(1).double()
    mean, covariance = flat.mean(1), torch.cov(flat)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = (vectors * values.rsqrt()) @ vectors.T
    colour = (vectors * values.sqrt()) @ vectors.T
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight = quant.weight[:4, :, 0, 0].double()
    bias = quant.bias[:4].double()
    quant.weight[:4, :, 0, 0] = (whiten @ weight).float()
    quant.bias[:4] = (whiten @ (bias - mean)).float()
    quant.weight[4:] = 0  # the posterior's width is a constant, as in training
    quant.bias[4:] = 2 * math.log(POSTERIOR_STD)
    back = post.weight[:, :, 0, 0].double()
    post.bias += (back @ mean).float()
    post.weight[:, :, 0, 0] = (back @ colour).float()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as latents (N, 4, H/8, W/8): the posterior's mean."""
    return vae.quant_conv(vae.encoder(pictures))[:, :4]


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, count: int = 64, size: int = 256) -> float:
    """Mean PSNR in dB of `count` fresh scenes through encoder and decoder (peak 255)."""
    rng = np.random.default_rng((SEED, 3))
    total = 0.0
    for _ in range(count):
        picture = to_tensor([scenes.render(scenes.sample_scene(rng), size, size, rng)])
        output = vae.decode(encode(vae, picture)).sample.clamp(-1, 1)
        total += 10 * math.log10(4 / F.mse_loss(output, picture).item())
    return total / count


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[[Run], None], int]] = {
    "vae": (train_vae, 3600),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="default: all, in order")
    parser.add_argument("--minutes", type=float, default=math.inf, help="length of this segment")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    for name in arguments.stages or STAGES:
        function, steps = STAGES[name]
        run = Run(name, steps, deadline)
        if run.finished:
            print(f"{name}: finished before")
            continue
        started = time.monotonic()
        function(run)
        print(f"{name}: step {run.step} of {steps}, {(time.monotonic() - started) / 60:.1f} min")
        if not run.finished:
            break


if __name__ == "__main__":
    main()
