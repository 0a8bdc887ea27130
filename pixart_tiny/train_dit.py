"""Stages `latents…` and `dit…`: the transformer, on latents that are computed once."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from pixart_tiny import scenes
from pixart_tiny.data import (
    PATCH_QUESTIONS,
    SEED,
    Embeddings,
    LatentSet,
    RenderedScenes,
    Size,
    draw_size,
    latents_file,
)
from pixart_tiny.fit import Ema, Muon, Run, fit
from pixart_tiny.models import (
    Conditioner,
    Denoiser,
    encode,
    low_precision,
    make_scheduler,
    make_transformer,
)

SECOND_TASK = 0.1  # weight of the second task's loss, see `Denoiser`
OBJECT_WEIGHT = 3.0  # in the loss, of a patch that shows an object, from 1.0 for background
DECIDED = 600  # … at timesteps below this. Above it the layout is still open, and weights that
# depend on the answer would teach the model to paint more object than there is.


@torch.no_grad()
def make_latents(run: Run) -> None:
    """Renders and encodes the images of every size; sizes that are already there are kept."""
    vae = AutoencoderKL.from_pretrained(run.output / "vae" / "vae")
    vae = vae.to(run.device, memory_format=torch.channels_last)
    condition = Conditioner(run.output / "text")

    def to_latents(pixels: torch.Tensor) -> torch.Tensor:
        with low_precision(run.device):
            return encode(vae, pixels)

    for size, count in run.images.items():
        file = latents_file(run.folder, size)
        if time.monotonic() > run.deadline:
            return
        if not file.is_file():
            drawn = RenderedScenes(size, count, seed=6)
            LatentSet.make(drawn, to_latents, condition.tokenize, run.device).save(file)
    run.finish(images=sum(run.images.values()))


def train_dit(
    run: Run,
    shares: dict[Size, float],
    learning_rate: float,
    start: str | None = None,
    latents_from: str = "latents",
) -> None:
    """Trains the DiT on cached latents.

    Each step draws one image size, by `shares`. `start`: the stage to go on from.
    """
    torch.manual_seed(SEED)
    transformer = make_transformer()
    if start:
        transformer = PixArtTransformer2DModel.from_pretrained(run.output / start / "transformer")
    denoiser = Denoiser(transformer).to(run.device)
    if start and (heads := run.output / start / "answers.pt").is_file():
        denoiser.load_state_dict(torch.load(heads, weights_only=True), strict=False)
    if not run.is_short:
        denoiser.compile_blocks()
    ema = Ema(transformer.parameters(), decay=0.999)
    condition = Conditioner(run.output / "text").to(run.device)
    nothing = Embeddings.of(condition.tokenize([""]).to(run.device), condition)
    folder = run.output / latents_from
    sets = {
        size: LatentSet.load(latents_file(folder, size), condition, run.device) for size in shares
    }
    alphas = make_scheduler().alphas_cumprod.to(run.device)

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        latents, labels, conditions = sets[draw_size(shares, rng)].batch(run.batch, nothing)
        timestep = draw_timesteps(run.batch, run.device)
        return diffusion_losses(denoiser, alphas, latents, labels, conditions, timestep)

    optimizers = make_optimizers(denoiser, learning_rate)
    complete = fit(run, {"model": denoiser}, optimizers, losses, ema=ema)
    heads = {k: v for k, v in denoiser.state_dict().items() if not k.startswith("transformer.")}
    torch.save(heads, run.folder / "answers.pt")
    ema.copy_to_parameters()
    transformer.save_pretrained(run.folder / "transformer")
    if complete:
        run.finish()


def draw_timesteps(count: int, device: str) -> torch.Tensor:
    """Timesteps where the image is decided: logit-normal around 525, every sixth uniform.

    Esser et al. 2024 for rectified flows; with PixArt's linear schedule an object's shape becomes
    visible below about 600.
    """
    drawn = torch.sigmoid(0.1 + torch.randn(count, device=device))
    uniform, which = torch.rand(2, count, device=device)
    return (torch.where(which < 1 / 6, uniform, drawn) * 1000).long().clamp(0, 999)


def diffusion_losses(
    denoiser: Denoiser,
    alphas: torch.Tensor,
    latents: torch.Tensor,
    labels: torch.Tensor,
    conditions: tuple[torch.Tensor, torch.Tensor],
    timestep: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Mean squared error of the velocity, v = α·noise − σ·latents, and the second task's loss."""
    noise = torch.randn_like(latents)
    alpha = alphas[timestep].sqrt()[:, None, None, None]
    sigma = (1 - alphas[timestep]).sqrt()[:, None, None, None]
    noisy, target = alpha * latents + sigma * noise, alpha * noise - sigma * latents
    with low_precision(latents.device.type):
        velocity, answers = denoiser(noisy, *conditions, timestep)
    second = [
        F.cross_entropy(answer.flatten(0, 1), label.flatten().long())
        for answer, label in zip(
            answers.float().split([*PATCH_QUESTIONS.values()], dim=-1),
            labels.unbind(-1),
            strict=True,
        )
    ]
    error = F.avg_pool2d((velocity - target).square().mean(1), 2).flatten(1)  # (B, patches)
    is_object = labels[..., 0] < len(scenes.SHAPES)
    weight = torch.where(is_object & (timestep[:, None] < DECIDED), OBJECT_WEIGHT, 1.0)
    velocity_loss, second_loss = (weight * error).sum() / weight.sum(), sum(second) / len(second)
    return {
        "loss": velocity_loss + SECOND_TASK * second_loss,
        "velocity": velocity_loss,
        "second task": second_loss,
    }


def make_optimizers(denoiser: Denoiser, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    blocks = denoiser.transformer.transformer_blocks
    inside = [p for p in blocks.parameters() if p.ndim == 2 and len(p) > 6]
    chosen = {id(p) for p in inside}
    rest = [p for p in denoiser.parameters() if id(p) not in chosen]
    return [
        Muon(inside, 1.5 * learning_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
