"""Generates held-out captions with a checkpoint and reads the images back with the oracle.

    python -m pixart_tiny.evaluate                         # the embedded checkpoint, with torch
    python -m pixart_tiny.evaluate models/pixart-tiny/fp16 # an OpenVINO folder
    python -m pixart_tiny.evaluate --shape 4:3             # another aspect ratio

The 200 captions and seeds (assets/captions/pixart-tiny-validation.csv) are fixed: every
one-object caption has a (colour, shape) pair that training never saw, every two-object caption a
(shape, relation, shape) triple that training never saw and at least one such pair. Prints the share
of captions with every attribute right, per attribute and per number of objects, and writes an
unselected contact sheet of the list's first 32 captions to build/evaluation/.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm.auto import tqdm

from ov_pixart_helper import default_settings, image_sizes, load_pipeline
from pixart_tiny import oracle, render, scenes

CHECKPOINT = Path("assets/pixart-tiny")
CAPTIONS = Path("assets/captions/pixart-tiny-validation.csv")
OUTPUT = Path("build/evaluation")
SEED = 20_000  # of the held-out captions
VAE_SEED = (0, 3)  # of the scenes that the VAE reconstructs


def write_captions(path: Path = CAPTIONS, count: int = 200) -> None:
    """Draws the held-out captions, one- and two-object scenes in turn, no caption twice."""
    rng = np.random.default_rng(SEED)
    rows: dict[str, int] = {}
    while len(rows) < count:
        scene = scenes.sample_scene(rng, num_objects=1 + len(rows) % 2)
        if not scene.has_held_out_pair():
            continue
        if scene.relation is not None and not scene.has_held_out_triple():
            continue
        rows.setdefault(scenes.describe(scene, rng), SEED + len(rows))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["caption", "seed"])
        writer.writerows(rows.items())


def read_captions(path: Path = CAPTIONS) -> list[tuple[str, int]]:
    """The rows (caption, seed) of a captions file."""
    with path.open(newline="") as file:
        return [(row["caption"], int(row["seed"])) for row in csv.DictReader(file)]


def generate(
    pipeline: DiffusionPipeline,
    rows: list[tuple[str, int]],
    *,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    batch: int = 10,
) -> list[Image.Image]:
    """One image per row (caption, seed). Each has its own generator: batches change nothing."""
    images = []
    for start in tqdm(range(0, len(rows), batch), desc="images", mininterval=5):
        group = rows[start : start + batch]
        images += pipeline(
            [caption for caption, _ in group],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _, seed in group],
        ).images
    return images


def tally(images: list[Image.Image], captions: list[str]) -> dict[str, dict[str, float]]:
    """Number of objects → attribute (and "right": all of them) → share of captions, in per cent."""
    groups: dict[str, list[oracle.Score]] = {"one object": [], "two objects": []}
    for image, caption in zip(images, captions, strict=True):
        scene = scenes.parse_caption(caption)
        name = "one object" if len(scene.objects) == 1 else "two objects"
        groups[name].append(oracle.score_caption(image, scene))
    return {
        name: {"right": 100 * float(np.mean([s.right for s in scores]))}
        | {
            attribute: 100 * float(np.mean([s.attributes[attribute] for s in scores]))
            for attribute in scores[0].attributes
        }
        for name, scores in groups.items()
        if scores
    }


def contact_sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    """Images of one size in a grid, in order."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: list[np.ndarray]) -> list[np.ndarray]:
    """Images of one size, `(H, W, 3)` uint8, through the VAE's encoder and decoder."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    output = vae.decode(latents).sample.clamp(-1, 1)
    return list(((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def vae_psnr(vae: AutoencoderKL, count: int = 64, height: int = 256, width: int = 256) -> float:
    """Mean PSNR in dB of `count` renderings of fresh scenes through encoder and decoder."""
    rng = np.random.default_rng(VAE_SEED)
    values = []
    for _ in range(count):
        image = render.render_scene(scenes.sample_scene(rng), height, width, rng)
        values.append(peak_signal_noise_ratio(image, reconstruct(vae, [image])[0]))
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--shape", default="1:1", help="aspect ratio, for example 4:3")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's own, 20 or 4")
    parser.add_argument("--guidance-scale", type=float, help="default: its own, 4.5 or 0")
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    arguments = parser.parse_args()
    rows = read_captions()[: arguments.count]
    height, width = image_sizes(arguments.folder)[arguments.shape]
    settings = default_settings(arguments.folder)
    pipeline = load_pipeline(arguments.folder)
    pipeline.set_progress_bar_config(disable=True)
    guidance_scale = arguments.guidance_scale
    images = generate(
        pipeline,
        rows,
        height=height,
        width=width,
        steps=arguments.steps or settings.num_inference_steps,
        guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
    )
    figures: dict = tally(images, [caption for caption, _ in rows])
    if isinstance(getattr(pipeline, "vae", None), torch.nn.Module):
        figures["vae"] = {"reconstruction_db": vae_psnr(pipeline.vae)}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    name = f"{'-'.join(arguments.folder.parts[-2:])}-{arguments.shape.replace(':', 'x')}"
    contact_sheet(images[:32]).save(OUTPUT / f"{name}.png")
    (OUTPUT / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{arguments.folder}, {len(rows)} held-out captions, {width}×{height}")
    for group, shares in figures.items():
        print(f"  {group:12}", ", ".join(f"{name} {share:.1f}" for name, share in shares.items()))
    print(f"  sheet and figures: {OUTPUT / name}.png, .json")


if __name__ == "__main__":
    main()
