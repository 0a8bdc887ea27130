"""What training reads: rendered scenes with their captions, and the latents made of them once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pixart_tiny import render, scenes

if TYPE_CHECKING:
    from pixart_tiny.models import Conditioner

Size = tuple[int, int]  # (height, width) of an image in pixels

SEED = 0
NATIVE = (256, 256)
BINS = ((224, 288), (288, 224), (192, 336), (336, 192))  # 4:3, 3:4, 16:9, 9:16
CHUNK = 20  # scenes rendered in one go
CAPTIONS_PER_SCENE = 2
OMIT_SIZES = 0.2  # share of captions that leave the sizes open, as people do
OMIT_BACKGROUND = 0.12
CAPTION_DROPOUT = 0.1  # share of captions that become empty, for guidance

# What a patch shows: question → number of answers, the last of them for "no object here".
PATCH_QUESTIONS = {
    "shape": len(scenes.SHAPES) + 1,
    "colour": len(scenes.COLOURS) + 1,
    "size": len(scenes.SIZES) + 1,
    "dx": 13,
    "dy": 13,
}


def training_caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """Varied wording; some captions leave the sizes or the background open."""
    return scenes.describe(
        scene,
        rng,
        omit_sizes=rng.random() < OMIT_SIZES,
        omit_background=rng.random() < OMIT_BACKGROUND,
    )


def draw_caption(rng: np.random.Generator) -> str:
    """A caption of a fresh training scene."""
    return training_caption(scenes.sample_training_scene(rng), rng)


def patch_labels(
    scene: scenes.Scene, layout: list[render.Placement], height: int, width: int
) -> np.ndarray:
    """What each of the DiT's patches shows, (patches, questions) int8: see `PATCH_QUESTIONS`.

    dx and dy are the distance from the object's centre in patches; an object's box includes what
    its light and shadow touch.
    """
    patch = render.RASTER
    y, x = np.mgrid[patch // 2 : height : patch, patch // 2 : width : patch].reshape(2, -1)
    labels = np.tile([size - 1 for size in PATCH_QUESTIONS.values()], (len(x), 1))
    short = min(height, width)
    for item, at in zip(scene.objects, layout, strict=True):
        dx, dy = (x - at.x * short) / patch, (y - at.y * short) / patch
        inside = np.maximum(abs(dx), abs(dy)) < at.radius * short / patch + 1
        labels[inside, :3] = [
            [*scenes.SHAPES].index(item.shape),
            [*scenes.COLOURS].index(item.colour),
            [*scenes.SIZES].index(item.size),
        ]
        labels[inside, 3] = np.clip(np.floor(dx[inside]) + 6, 0, 11)
        labels[inside, 4] = np.clip(np.floor(dy[inside]) + 6, 0, 11)
    return labels.astype(np.int8)


# ----------------------------------------------------------------------------------------------
# Rendered scenes
# ----------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Rendered training scenes of one size."""

    images: torch.Tensor  # (N, H, W, 3) uint8
    labels: torch.Tensor  # (N, patches, questions) int8
    captions: list[list[str]]  # N × `CAPTIONS_PER_SCENE`


class RenderedScenes(Dataset):
    """`count` scenes of one size in chunks of `CHUNK`; chunk i is the same whenever it is drawn."""

    def __init__(self, size: Size, count: int, seed: int) -> None:
        self.size, self.count, self.seed = size, count, seed

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, index: int) -> Samples:
        rng = np.random.default_rng((SEED, self.seed, *self.size, index))
        images, labels, captions = [], [], []
        for _ in range(min(CHUNK, self.count - index * CHUNK)):
            scene = scenes.sample_training_scene(rng)
            layout = render.place(scene, *self.size, rng)
            images.append(render.render_layout(scene, layout, *self.size))
            labels.append(patch_labels(scene, layout, *self.size))
            captions.append([training_caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)])
        return Samples(
            torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), captions
        )

    def chunks(self) -> Iterator[Samples]:
        """All chunks in order, rendered by one process per core where that pays."""
        for shape in scenes.SHAPES:  # fills the renderer's caches once for all processes
            scene = scenes.Scene((scenes.SceneObject("red", shape, "small"),), "white")
            render.render_layout(scene, [render.Placement(0.5, 0.5, 0.1)], 64, 64)
        workers = os.cpu_count() if len(self) > 8 else 0
        loader = DataLoader(self, batch_size=None, num_workers=workers)
        yield from tqdm(loader, "rendering {1}×{0}".format(*self.size), mininterval=10)


def render_pool(
    sizes: dict[Size, int], seed: int, device: str
) -> dict[Size, tuple[torch.Tensor, list[str]]]:
    """Size → its images (N, H, W, 3) uint8 on the device and a caption for each."""
    pool = {}
    for size, count in sizes.items():
        images, captions = [], []
        for chunk in RenderedScenes(size, count, seed).chunks():
            images.append(chunk.images.to(device, copy=True))
            captions += [first for first, *_ in chunk.captions]
        pool[size] = torch.cat(images), captions
    return pool


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, H, W, 3) → (N, 3, H, W) in [-1, 1], channels last in memory."""
    pixels = images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return pixels.contiguous(memory_format=torch.channels_last)


def draw_size(shares: dict[Size, float], rng: np.random.Generator) -> Size:
    """One of the sizes, each as often as its share of the sum."""
    weights = np.array([*shares.values()])
    return [*shares][rng.choice(len(weights), p=weights / weights.sum())]


# ----------------------------------------------------------------------------------------------
# Latents, computed once
# ----------------------------------------------------------------------------------------------


@dataclass
class Embeddings:
    """What the frozen text encoder makes of captions, computed once."""

    features: torch.Tensor  # (N, L, width) float16
    mask: torch.Tensor  # (N, L)

    @classmethod
    def of(cls, tokens: torch.Tensor, condition: Conditioner) -> Embeddings:
        """Encodes token ids (N, L)."""
        parts = [condition(part.long()) for part in tokens.split(1024)]
        features, masks = zip(*((part.half(), mask) for part, mask in parts), strict=True)
        return cls(torch.cat(features), torch.cat(masks))

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, width) float32 and mask (B, L) of these captions."""
        return self.features[indices].float(), self.mask[indices]


@dataclass
class LatentSet:
    """Scenes of one size as the DiT sees them, and their captions as token ids."""

    latents: torch.Tensor  # (N, 4, H/8, W/8) float16
    labels: torch.Tensor  # (N, patches, questions) int8
    tokens: torch.Tensor  # (N, `CAPTIONS_PER_SCENE`, L) int16
    embeddings: Embeddings | None = None  # of every caption, after `load`

    @classmethod
    def make(
        cls,
        scenes_of_one_size: RenderedScenes,
        encode: Callable[[torch.Tensor], torch.Tensor],
        tokenize: Callable[[list[str]], torch.Tensor],
        device: str,
    ) -> LatentSet:
        """Renders the scenes and encodes their images and captions."""
        parts = []
        for chunk in scenes_of_one_size.chunks():
            latents = encode(to_pixels(chunk.images.to(device)))
            tokens = tokenize([caption for group in chunk.captions for caption in group])
            tokens = tokens.unflatten(0, (-1, CAPTIONS_PER_SCENE))
            parts.append((latents.half().cpu(), chunk.labels.clone(), tokens.short()))
        return cls(*(torch.cat(tensors).contiguous() for tensors in zip(*parts, strict=True)))

    def save(self, file: Path) -> None:
        tensors = {name: getattr(self, name) for name in ("latents", "labels", "tokens")}
        save_atomically(tensors, file)

    @classmethod
    def load(cls, file: Path, condition: Conditioner, device: str) -> LatentSet:
        latents = cls(**torch.load(file, map_location=device, weights_only=True))
        latents.embeddings = Embeddings.of(latents.tokens.flatten(0, 1), condition)
        return latents

    def batch(
        self, count: int, nothing: Embeddings | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """`count` scenes: latents, labels, and embeddings with mask of one caption each.

        Some captions become `nothing`, the empty caption. All draws are made on the device: copies
        from the CPU would make it wait for the GPU in every step.
        """
        device = self.latents.device
        drawn = torch.randint(len(self.latents), (count,), device=device)
        which = torch.randint(CAPTIONS_PER_SCENE, (count,), device=device)
        features, mask = self.embeddings.take(drawn * CAPTIONS_PER_SCENE + which)
        if nothing is not None:
            dropped = torch.rand(count, device=device) < CAPTION_DROPOUT
            empty_features, empty_mask = nothing.take(torch.zeros_like(drawn))
            features = torch.where(dropped[:, None, None], empty_features, features)
            mask = torch.where(dropped[:, None], empty_mask, mask)
        return self.latents[drawn].float(), self.labels[drawn], (features, mask)


def latents_file(folder: Path, size: Size) -> Path:
    """Where the `latents` stage keeps its scenes of this size."""
    return folder / "{}x{}.pt".format(*size)


def save_atomically(tensors: dict, file: Path) -> None:
    """Writes the file in one piece: an interrupted run leaves no half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)
