"""Asks PixArt-tiny for held-out captions and lets the oracle say what it painted.

    python -m assets.training.evaluate                     # the embedded checkpoint, with torch
    python -m assets.training.evaluate models/pixart-tiny/fp16  # an OpenVINO folder
    python -m assets.training.evaluate --shape 4:3         # another aspect bin

The 200 captions and seeds (assets/captions/pixart-tiny-validation.csv) are fixed: every
one-object caption has a (colour, kind) pair that training never saw, every two-object caption a
(kind, relation, kind) triple that training never saw and at least one such pair. Prints the share
of captions with every attribute right, per attribute and per kind of scene, and writes an
unselected contact sheet of the list's first 32 captions to build/evaluation/.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, PixArtAlphaPipeline
from PIL import Image
from tqdm.auto import tqdm

from assets.training import oracle, scenes

CAPTIONS = Path("assets/captions/pixart-tiny-validation.csv")
OUTPUT = Path("build/evaluation")
SHAPES = {  # name → (height, width) of the 256² bins
    "1:1": (256, 256),
    "4:3": (224, 288),
    "3:4": (288, 224),
    "16:9": (192, 336),
    "9:16": (336, 192),
}
SEED = 20_000


def write_captions(path: Path = CAPTIONS, count: int = 200) -> None:
    """Draws the held-out captions, one- and two-object scenes in turn, no caption twice."""
    rng = np.random.default_rng(SEED)
    rows: dict[str, int] = {}
    while len(rows) < count:
        scene = scenes.sample_scene(rng, num_things=1 + len(rows) % 2)
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


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """A torch pipeline, or an OpenVINO one where the folder holds IR."""
    if (folder / "transformer" / "openvino_model.xml").is_file():
        from ov_pixart_helper import OVPixArtAlphaPipeline

        pipeline = OVPixArtAlphaPipeline.from_pretrained(folder)
    else:
        pipeline = PixArtAlphaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    """One picture a row; each has a generator of its own, so batching changes nothing."""
    pictures = []
    for start in tqdm(range(0, len(rows), batch), desc="pictures", mininterval=5):
        group = rows[start : start + batch]
        pictures += pipeline(
            [caption for caption, _ in group],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _, seed in group],
        ).images
    return pictures


def tally(pictures: list[Image.Image], captions: list[str]) -> dict[str, dict[str, float]]:
    """Kind of scene → attribute (and "right": all of them) → share of captions, in per cent."""
    groups: dict[str, list[oracle.Score]] = {"one object": [], "two objects": []}
    for picture, caption in zip(pictures, captions, strict=True):
        scene = scenes.parse_caption(caption)
        name = "one object" if len(scene.things) == 1 else "two objects"
        groups[name].append(oracle.score_caption(picture, scene))
    return {
        name: {"right": 100 * float(np.mean([s.right for s in scores]))}
        | {
            attribute: 100 * float(np.mean([s.attributes[attribute] for s in scores]))
            for attribute in scores[0].attributes
        }
        for name, scores in groups.items()
        if scores
    }


def contact_sheet(pictures: list[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures of one size in a grid, in order."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def vae_reconstruction_db(pipeline: PixArtAlphaPipeline, count: int = 64) -> float:
    """Mean PSNR of fresh 256² renders through the VAE's encoder and decoder."""
    from assets.training.train import vae_psnr

    return vae_psnr(pipeline.vae, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("assets/pixart-tiny"))
    parser.add_argument("--shape", choices=SHAPES, default="1:1")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's own, 20 or 4")
    parser.add_argument("--guidance-scale", type=float, help="default: its own, 4.5 or 0")
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    arguments = parser.parse_args()
    rows = read_captions()[: arguments.count]
    height, width = SHAPES[arguments.shape]
    pipeline = load_pipeline(arguments.folder)
    steps, guidance_scale = arguments.steps, arguments.guidance_scale
    if type(pipeline.scheduler) is LCMScheduler:
        steps, guidance_scale = steps or 4, guidance_scale or 0.0
    pictures = generate(
        pipeline,
        rows,
        height=height,
        width=width,
        steps=steps or 20,
        guidance_scale=4.5 if guidance_scale is None else guidance_scale,
    )
    figures: dict = tally(pictures, [caption for caption, _ in rows])
    if isinstance(getattr(pipeline, "vae", None), torch.nn.Module):
        figures["vae"] = {"reconstruction_db": vae_reconstruction_db(pipeline)}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    name = f"{'-'.join(arguments.folder.parts[-2:])}-{arguments.shape.replace(':', 'x')}"
    contact_sheet(pictures[:32]).save(OUTPUT / f"{name}.png")
    (OUTPUT / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{arguments.folder}, {len(rows)} held-out captions, {width}×{height}")
    for group, shares in figures.items():
        print(f"  {group:12}", ", ".join(f"{name} {share:.1f}" for name, share in shares.items()))
    print(f"  sheet and figures: {OUTPUT / name}.png, .json")


if __name__ == "__main__":
    main()
