"""Stages `chains` and `lcm`: a few-step model, taught by the finished DiT's trajectories.

`LCMScheduler` predicts the image, noises the prediction for the next stop, and predicts again. The
few-step model learns, for every stop, where the teacher's deterministic trajectory from there ends.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

from pixart_tiny.data import (
    SEED,
    Embeddings,
    LatentSet,
    Size,
    draw_caption,
    draw_size,
    latents_file,
    save_atomically,
)
from pixart_tiny.fit import Ema, Run, fit
from pixart_tiny.models import Conditioner, Denoiser, low_precision, make_scheduler
from pixart_tiny.train_dit import OBJECT_WEIGHT, make_optimizers

LCM_TIMESTEPS = (999, 759, 499, 259)  # where diffusers' LCMScheduler stops in four steps
SOLVER_STEPS = 4  # of the teacher, from each stop to the next
GUIDANCE_SCALE = 4.5
GUIDED_ABOVE = 500  # timestep; guidance all the way makes outlines worse
# A chain's i-th trajectory starts at the i-th stop: all (stop passed, trajectory) pairs, in order.
CHAIN_POINTS = [(stop, i) for i in range(len(LCM_TIMESTEPS)) for stop in range(i, 4)]
# (point, stop, trajectory), drawn evenly: a trajectory's start three times as often as later stops.
CHAIN_PAIRS = [
    (point, stop, i)
    for point, (stop, i) in enumerate(CHAIN_POINTS)
    for _ in range(3 if stop == i else 1)
]
HUBER = 0.05  # error per latent value above which the loss grows linearly
REAL_SHARE = 0.25  # of a batch: noised latents of rendered scenes, their own target
REAL_STOPS = (2, 4)  # … at stops from the third on, where noise leaves the layout in no doubt


# ----------------------------------------------------------------------------------------------
# Chains of trajectories
# ----------------------------------------------------------------------------------------------


@dataclass
class Chains:
    """Chains of one size: per caption a trajectory from each stop to the image."""

    points: torch.Tensor  # (N, 10, 4, H, W) float16, by `CHAIN_POINTS`
    ends: torch.Tensor  # (N, 4, 4, H, W) float16, the trajectories' ends
    embeddings: Embeddings
    pairs: torch.Tensor  # `CHAIN_PAIRS` on the device

    @classmethod
    def load(cls, files: list[Path], condition: Conditioner, device: str) -> Chains:
        parts = [torch.load(file, map_location=device, weights_only=True) for file in files]
        points, ends, tokens = (
            torch.cat([part[name] for part in parts]) for name in ("points", "ends", "tokens")
        )
        pairs = torch.tensor(CHAIN_PAIRS, device=device)
        return cls(points, ends, Embeddings.of(tokens, condition), pairs)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple]:
        """Latents at a stop, the end of their trajectory, the stop's index, embeddings and mask."""
        device = self.points.device
        which = self.pairs[torch.randint(len(self.pairs), (count,), device=device)]
        drawn = torch.randint(len(self.points), (count,), device=device)
        index, stop, trajectory = which.unbind(1)
        points, ends = self.points[drawn, index].float(), self.ends[drawn, trajectory].float()
        return points, ends, stop, self.embeddings.take(drawn)


def chains_file(folder: Path, size: Size) -> Path:
    """Where a stage that makes chains keeps those of this size."""
    return folder / "{}x{}.pt".format(*size)


@torch.no_grad()
def make_chains(run: Run, teacher_from: str, student_from: str | None = None) -> None:
    """Follows the teacher from wherever the few-step model will stand to the image.

    Between two stops the image is noised afresh, as `LCMScheduler` does: the end of the teacher's
    trajectory or, with `student_from`, that student's own prediction. A student that has seen its
    own mistakes learns to correct them (Ross et al. 2011, "DAgger").
    """
    condition = Conditioner(run.output / "text").to(run.device)
    empty = condition.tokenize([""])
    teacher = load_denoiser(run, teacher_from)
    student = load_denoiser(run, student_from) if student_from else None
    for size, count in run.images.items():
        file = chains_file(run.folder, size)
        parts = []
        for start in range(0, 0 if file.is_file() else count, run.batch):
            if time.monotonic() > run.deadline:
                return
            rng = np.random.default_rng((*run.seeds(start), *size))
            torch.manual_seed(int(rng.integers(2**31)))
            tokens = condition.tokenize([draw_caption(rng) for _ in range(run.batch)])
            conditions = condition(torch.cat([empty, tokens]).to(run.device))
            with low_precision(run.device):
                points, ends = follow_chain(teacher, student, size, conditions)
            parts.append((points.half().cpu(), ends.half().cpu(), tokens.short()))
        if parts:
            tensors = (torch.cat(group) for group in zip(*parts, strict=True))
            save_atomically(dict(zip(("points", "ends", "tokens"), tensors, strict=True)), file)
    run.finish(chains=sum(run.images.values()))


def load_denoiser(run: Run, stage: str) -> Denoiser:
    """The transformer of an earlier stage, ready to generate."""
    folder = run.output / stage / "transformer"
    model = Denoiser(PixArtTransformer2DModel.from_pretrained(folder)).to(run.device).eval()
    if max(run.images.values()) >= 4 * run.batch:
        model.compile_blocks()
    return model


def follow_chain(
    teacher: Denoiser, student: Denoiser | None, size: Size, conditions: tuple
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chain per caption: points (B, 10, 4, H, W) by `CHAIN_POINTS`, ends (B, 4, 4, H, W)."""
    features = conditions[0]
    alphas = make_scheduler().alphas_cumprod
    shape = (len(features) - 1, 4, size[0] // 8, size[1] // 8)
    points, ends, image = [], [], torch.zeros(shape, device=features.device)
    for i, timestep in enumerate(LCM_TIMESTEPS):
        noise = torch.randn(shape, device=features.device)
        alpha, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        start = noise if i == 0 else alpha * image + sigma * noise
        passed, image = follow_teacher(teacher, start, i, conditions)
        points += passed
        ends.append(image)
        if student:
            velocity = guided_velocity(student, start, timestep, conditions, guided=False)
            image = alpha * start - sigma * velocity
    return torch.stack(points, 1), torch.stack(ends, 1)


def follow_teacher(
    teacher: Denoiser, latents: torch.Tensor, stop: int, conditions: tuple
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The latents at this stop and all later ones, and at the end.

    Deterministic: from one starting point the few-step model can learn to foresee one end.
    """
    scheduler = make_scheduler()
    scheduler.set_timesteps(
        timesteps=[
            round(start + (end - start) * k / SOLVER_STEPS)
            for start, end in itertools.pairwise([*LCM_TIMESTEPS[stop:], 0])
            for k in range(SOLVER_STEPS)
        ]
    )
    points = []
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        if step % SOLVER_STEPS == 0:
            points.append(latents)
        guided = timestep > GUIDED_ABOVE
        velocity = guided_velocity(teacher, latents, timestep, conditions, guided=guided)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return points, latents


def guided_velocity(
    model: Denoiser,
    latents: torch.Tensor,
    timestep: int,
    conditions: tuple[torch.Tensor, torch.Tensor],
    *,
    guided: bool,
) -> torch.Tensor:
    """The velocity of latents (B, 4, H, W), with or without guidance.

    `conditions`: embeddings (1 + B, L, 192) and mask (1 + B, L), the empty caption's first.
    """
    times = torch.full((len(latents),), timestep, device=latents.device)
    given, _ = model(latents, *(tensor[1:] for tensor in conditions), times)
    if not guided:
        return given
    empty = (tensor[:1].expand(len(latents), *tensor.shape[1:]) for tensor in conditions)
    without, _ = model(latents, *empty, times)
    return without + GUIDANCE_SCALE * (given - without)


# ----------------------------------------------------------------------------------------------
# The few-step model
# ----------------------------------------------------------------------------------------------


def train_lcm(
    run: Run,
    start: str,
    chains_from: list[str],
    learning_rate: float,
    latents_from: str = "latents",
) -> None:
    """Teaches the few-step model to jump from each stop to the image; guidance is baked in.

    A consistency model (Song et al. 2023) learned from whole trajectories: the targets are the
    teacher's own and need no second network. Some of each batch is real: noised latents of rendered
    scenes, which are sharper targets than any teacher's.
    """
    torch.manual_seed(SEED)
    transformer = PixArtTransformer2DModel.from_pretrained(run.output / start / "transformer")
    denoiser = Denoiser(transformer).to(run.device)
    if not run.is_short:
        denoiser.compile_blocks()
    ema = Ema(transformer.parameters(), decay=0.999)
    condition = Conditioner(run.output / "text").to(run.device)
    alphas = make_scheduler().alphas_cumprod.to(run.device)
    stops = torch.tensor(LCM_TIMESTEPS, device=run.device)
    chains, latents = {}, {}
    for size in run.images:
        files = [chains_file(run.output / stage, size) for stage in chains_from]
        chains[size] = Chains.load(files, condition, run.device)
        file = latents_file(run.output / latents_from, size)
        latents[size] = LatentSet.load(file, condition, run.device)
    num_real = max(1, int(REAL_SHARE * run.batch))

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        size = draw_size(run.images, rng)
        points, ends, stop, conditions = chains[size].batch(run.batch - num_real)
        clean, _, real_conditions = latents[size].batch(num_real)
        real_stop = torch.randint(*REAL_STOPS, (num_real,), device=run.device)
        timestep = stops[torch.cat([stop, real_stop])]
        alpha = alphas[timestep].sqrt()[:, None, None, None]
        sigma = (1 - alphas[timestep]).sqrt()[:, None, None, None]
        noised = alpha[-num_real:] * clean + sigma[-num_real:] * torch.randn_like(clean)
        noisy, target = torch.cat([points, noised]), torch.cat([ends, clean])
        conditions = [torch.cat(both) for both in zip(conditions, real_conditions, strict=True)]
        with low_precision(run.device):
            velocity, _ = denoiser(noisy, *conditions, timestep)
        error = image_error(alpha * noisy - sigma * velocity, target)
        last = (timestep == LCM_TIMESTEPS[-1]).float()
        return {"loss": error.mean(), "last stop": (last * error).sum() / last.sum().clamp(min=1)}

    optimizers = make_optimizers(denoiser, learning_rate)
    if fit(run, {"model": denoiser}, optimizers, losses, ema=ema):
        ema.copy_to_parameters()
        transformer.save_pretrained(run.folder / "transformer")
        run.finish()


def image_error(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber error of each image (B,), larger where the target differs from its background.

    Squared errors average over outcomes, and an average of outlines is soft. Objects count up to
    `OBJECT_WEIGHT` times as much; the median latent stands for the background.
    """
    background = target.flatten(2).median(-1).values[..., None, None]
    contrast = (target - background).abs().mean(1).clamp(max=1)
    weight = 1 + (OBJECT_WEIGHT - 1) * contrast
    distance = ((predicted - target).square().mean(1) + HUBER**2).sqrt() - HUBER
    return (weight * distance).mean((1, 2)) / weight.mean((1, 2))
