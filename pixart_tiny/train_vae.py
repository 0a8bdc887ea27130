"""Stages `vae` and `decoder`: the VAE, and its decoder again on latents as the DiT leaves them."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from pixart_tiny.data import NATIVE, SEED, Embeddings, Size, draw_size, render_pool, to_pixels
from pixart_tiny.fit import Ema, Run, fit
from pixart_tiny.models import (
    Conditioner,
    Denoiser,
    decode,
    encode,
    low_precision,
    make_scheduler,
    make_vae,
)
from pixart_tiny.train_lcm import LCM_TIMESTEPS, guided_velocity

POSTERIOR_STD = 0.2  # noise on unit-variance latents, which the decoder learns to ignore
HELD_OUT_SEED = 3  # of the scenes that measure the VAE; no stage trains on them


# ----------------------------------------------------------------------------------------------
# The VAE
# ----------------------------------------------------------------------------------------------


def train_vae(run: Run) -> None:
    """Trains the VAE with fixed posterior noise on latents held at zero mean and unit variance."""
    torch.manual_seed(SEED)
    vae = make_vae().to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(vae.parameters(), decay=0.999)
    pool = {size: images for size, (images, _) in render_pool(run.images, 2, run.device).items()}

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        pixels = draw_pixels(pool, run, rng)
        with low_precision(run.device):
            mean = encode(vae, pixels).float()
            width = POSTERIOR_STD * 2 * torch.rand(len(mean), 1, 1, 1, device=run.device)
            output = decode(vae, mean + width * torch.randn_like(mean)).float()
        channel_mean, channel_std = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
        whiteness = (channel_mean.square() + (channel_std - 1).square()).mean()
        reconstruction = reconstruction_loss(output, pixels)
        return {
            "loss": reconstruction + 0.02 * whiteness,
            "mean squared error": F.mse_loss(output, pixels),
        }

    if fit(run, {"model": vae}, [optimizer], losses, ema=ema):
        ema.copy_to_parameters()
        whiten_latents(vae, pool[NATIVE][:400])
        vae.save_pretrained(run.folder / "vae")
        run.finish(psnr_db=round(held_out_psnr(vae, 2 if run.is_short else 40), 2))


def draw_pixels(pool: dict[Size, torch.Tensor], run: Run, rng: np.random.Generator) -> torch.Tensor:
    """A batch of one size; sizes come as often as the stage has images of them."""
    images = pool[draw_size(run.images, rng)]
    return to_pixels(images[torch.randint(len(images), (run.batch,), device=run.device)])


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2 with extra weight on edges, where an 8× VAE blurs first, and on vivid colours.

    Objects cover a tenth of an image: without the weight on vivid colours (and the same error once
    more after 8× average pooling) the VAE spends its four channels on edges and mixes up hues.
    """
    dx = F.pad((target[..., 1:] - target[..., :-1]).abs().amax(1, keepdim=True), (0, 1))
    dy = F.pad((target[..., 1:, :] - target[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 0, 1))
    edge = F.max_pool2d(torch.maximum(dx, dy), 5, 1, 2).clamp(max=1)
    vivid = target.amax(1, keepdim=True) - target.amin(1, keepdim=True)
    weighted = (1 + 4 * edge + 3 * vivid) * (output - target)
    pooled = F.avg_pool2d(weighted, 8)
    return (weighted.abs() + 2 * weighted.square() / 3).mean() + pooled.abs().mean()


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Gives latents zero mean and identity covariance without changing any reconstruction.

    PixArt's pipeline has one scaling factor for all channels, so channels of unequal strength
    would be noised unequally. Both 1×1 convolutions around the latents are linear: the whitening
    goes into `quant_conv` and its inverse into `post_quant_conv`. `images`: (N, H, W, 3) uint8.
    """
    latents = torch.cat([encode(vae, to_pixels(image[None])) for image in images])
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
def held_out_psnr(vae: AutoencoderKL, count: int) -> float:
    """Mean PSNR in dB of fresh 256² scenes through encoder and decoder (peak 255)."""
    images, _ = render_pool({NATIVE: count}, HELD_OUT_SEED, vae.device.type)[NATIVE]
    values = []
    for image in images:
        pixels = to_pixels(image[None])
        output = decode(vae, encode(vae, pixels)).clamp(-1, 1)
        values.append(10 * math.log10(4 / F.mse_loss(output, pixels).item()))
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------
# Its decoder, on latents as the DiT leaves them
# ----------------------------------------------------------------------------------------------

ALMOST_CLEAN = 300  # timestep below which the DiT no longer changes the layout
# Shares of the latents that the decoder is trained on.
SOURCES = {"encoder": 0.3, "transformer": 0.35, "few-step": 0.35}


def train_decoder(run: Run, vae_from: str, transformer_from: str, few_step_from: str) -> None:
    """Trains the decoder alone, so that the latents stay as they are.

    Images are encoded, noised, and cleaned by the DiT or the few-step model in one step. What they
    get wrong then (a weave on backgrounds, rough edges) is what they get wrong when they generate,
    but here the right answer is known.
    """
    vae = AutoencoderKL.from_pretrained(run.output / vae_from / "vae")
    vae = vae.to(run.device, memory_format=torch.channels_last)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(trained, decay=0.998)
    condition = Conditioner(run.output / "text").to(run.device)
    models = {
        name: Denoiser(PixArtTransformer2DModel.from_pretrained(run.output / stage / "transformer"))
        for name, stage in (("transformer", transformer_from), ("few-step", few_step_from))
    }
    models = {name: model.to(run.device).eval() for name, model in models.items()}
    nothing = condition(condition.tokenize([""]).to(run.device))
    alphas = make_scheduler().alphas_cumprod.to(run.device)
    pool = {
        size: (images, Embeddings.of(condition.tokenize(captions).to(run.device), condition))
        for size, (images, captions) in render_pool(run.images, 4, run.device).items()
    }

    @torch.no_grad()
    def draw(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (N, 4, H/8, W/8) and the pixels (N, 3, H, W) they stand for."""
        images, embeddings = pool[draw_size(run.images, rng)]
        drawn = torch.randint(len(images), (run.batch,), device=run.device)
        pixels = to_pixels(images[drawn])
        latents = encode(vae, pixels).float()
        noise = torch.randn_like(latents)
        source = draw_size(SOURCES, rng)
        if source == "encoder":
            return latents + POSTERIOR_STD * rng.random() * noise, pixels
        timestep = int(rng.integers(20, ALMOST_CLEAN))
        if source == "few-step":
            timestep = LCM_TIMESTEPS[-1]
        alpha, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        noisy = alpha * latents + sigma * noise
        given = embeddings.take(drawn)
        conditions = [torch.cat(both) for both in zip(nothing, given, strict=True)]
        velocity = guided_velocity(
            models[source], noisy, timestep, conditions, guided=source == "transformer"
        )
        return alpha * noisy - sigma * velocity, pixels

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        with low_precision(run.device):
            latents, pixels = draw(rng)
            output = decode(vae, latents.contiguous(memory_format=torch.channels_last)).float()
        loss = polish_loss(output, pixels)
        return {"loss": loss, "mean squared error": F.mse_loss(output, pixels)}

    if fit(run, {"model": vae}, [optimizer], losses, ema=ema):
        ema.copy_to_parameters()
        vae.save_pretrained(run.folder / "vae")
        run.finish(psnr_db=round(held_out_psnr(vae, 2 if run.is_short else 40), 2))


def polish_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 that weighs objects, surroundings and backgrounds about alike: no halos, no blotches.

    The image's edge counts more, because zero padding leaves a frame there, most visible on navy.
    """
    vivid = target.amax(1, keepdim=True) - target.amin(1, keepdim=True)
    near = F.max_pool2d((vivid > 0.5).float(), 31, 1, 15)
    frame = F.pad(torch.zeros_like(vivid[..., 3:-3, 3:-3]), (3, 3, 3, 3), value=1)
    error = output - target
    pooled = F.avg_pool2d(error, 4)
    return ((1 + 2 * near + vivid + 5 * frame) * error.abs()).mean() + 2 * (
        (1 + 2 * F.avg_pool2d(near, 4)) * pooled.abs()
    ).mean()
